"""Loading a Hugging Face folder in slices: what `helixify` makes of the whole model, without the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from helix import Grid
from helix.checkpoint.content import CheckpointError
from helix.comm.mesh import Mesh
from helix.partition.grid import PartitionError
from helix.pretrained.helixify import helixify
from helix.pretrained.loading import empty, load
from helix.pretrained.saving import save
from helix.study.memory import PeakMemory
from tests.pretrained import FAMILIES, tiny
from tests.ranks import on_ranks

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 20_000  # bytes; the tiny models have some 100,000


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by all their names, and buffers, those that are not stored too."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _unequal(model: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    one, two = _tensors(model), _tensors(other)
    if one.keys() != two.keys():
        return sorted(one.keys() ^ two.keys())
    return [name for name in one if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])]


def _once(make: Callable[[], None]) -> None:
    """On rank 0, before the others go on."""
    if dist.get_rank() == 0:
        make()
    dist.barrier()


def _load_all(root: Path, grids: list[Grid]) -> dict[str, list[str]]:
    """Every family, from one file or from several, on one of the grids; the tensors that differ."""
    logging.disable_progress_bar()
    meshes = [Mesh(grid) for grid in grids]

    def make() -> None:
        for number, family in enumerate(FAMILIES):
            tiny(family).save_pretrained(root / family, max_shard_size=SHARD if number % 2 else "1GB")

    _once(make)
    differing = {}
    for number, family in enumerate(FAMILIES):
        mesh = meshes[number // 2 % len(meshes)]
        loaded, whole = load(root / family, mesh), helixify(tiny(family), mesh)
        differing[family] = _unequal(loaded, whole)
        assert not loaded.training
        assert len(set(loaded.parameters())) == len(set(whole.parameters()))  # what is tied is one parameter
    return differing


def test_every_family_is_loaded_as_the_whole_is_partitioned(tmp_path: Path) -> None:
    for differing in on_ranks(4, _load_all, tmp_path, [Grid(2, 2), Grid(4, 1)]):
        assert not any(differing.values()), differing


def _as_the_hub_has_it(root: Path) -> dict[str, list[str]]:
    """Folders in older forms; the tensors that differ."""
    logging.disable_progress_bar()
    mesh = Mesh(Grid(2, 1))
    differing = {}

    def loaded_as(name: str, family: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        def make() -> None:
            tiny(family).save_pretrained(root / name)
            save_file(change(load_file(root / name / WEIGHTS)), root / name / WEIGHTS)

        _once(make)
        differing[name] = _unequal(load(root / name, mesh), helixify(tiny(family), mesh))

    def gammas(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {_replaced(name, old): each for name, each in stored.items()}
        extra = {
            "bert.pooler.dense.weight": torch.zeros(32, 32),
            "cls.seq_relationship.weight": torch.zeros(2, 32),
            "bert.embeddings.position_ids": torch.arange(128),
        }
        return renamed | extra

    def without_prefix(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("transformer."): each for name, each in stored.items()} | {
            "h.0.attn.bias": torch.ones(1, 1, 128, 128)
        }

    def stacked(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        del stored
        return {name: each.clone() for name, each in tiny("mixtral").state_dict().items()}

    def head_only(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
        return stored

    def both(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}

    loaded_as("gamma and beta", "bert", gammas)
    loaded_as("no prefix", "gpt2", without_prefix)
    loaded_as("stacked experts", "mixtral", stacked)
    loaded_as("head for embedding", "llama", head_only)
    loaded_as("head and embedding", "llama", both)
    return differing | {"encoder alone": _encoder_alone(root / "encoder", mesh), "bfloat16": _narrow(root, mesh)}


def _encoder_alone(folder: Path, mesh: Mesh) -> list[str]:
    def base() -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModel.from_config(tiny("bert").config)
        return model.eval()

    _once(lambda: base().save_pretrained(folder))
    return _unequal(load(folder, mesh), helixify(base(), mesh))


def _narrow(root: Path, mesh: Mesh) -> list[str]:
    """A bfloat16 folder in float32 and the other way round."""
    _once(lambda: tiny("gemma2", dtype=torch.bfloat16).save_pretrained(root / "narrow"))
    wide = load(root / "narrow", mesh)
    expected = helixify(tiny("gemma2", dtype=torch.bfloat16).float(), mesh)
    narrow = load(root / "gamma and beta", mesh, torch.bfloat16)
    halved = helixify(tiny("bert", dtype=torch.bfloat16), mesh)
    return [
        *(name for name, each in expected.named_parameters() if not torch.equal(each, wide.get_parameter(name))),
        *(name for name, each in halved.named_parameters() if not torch.equal(each, narrow.get_parameter(name))),
    ]


def _replaced(name: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def test_older_forms_of_the_hub_are_loaded(tmp_path: Path) -> None:
    for differing in on_ranks(2, _as_the_hub_has_it, tmp_path):
        assert not any(differing.values()), differing


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _break(root: Path) -> dict[str, str]:
    """Folders with something wrong, each with some of the words that should say what."""
    logging.disable_progress_bar()
    tiny("llama").save_pretrained(root / "whole")
    tiny("llama").save_pretrained(root / "sharded", max_shard_size=SHARD)
    expected = {}

    def broken(name: str, words: str, change: Callable[[Path], object], of: str = "whole") -> None:
        shutil.copytree(root / of, root / name)
        change(root / name)
        expected[name] = words

    def stored(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            tensors = load_file(folder / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / WEIGHTS)

        return apply

    def truncate(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:-1000])

    def pickled(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "pytorch_model.bin")

    def index(folder: Path, **places: str) -> None:
        body = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(body | {"weight_map": body["weight_map"] | places}))

    query = "model.layers.0.self_attn.q_proj.weight"
    broken("no config", "no config.json", lambda folder: (folder / "config.json").unlink())
    broken("config text", "config.json cannot be read", lambda folder: (folder / "config.json").write_text("{"))
    broken("config list", "not an object", lambda folder: (folder / "config.json").write_text("[1]"))
    broken("config size", "transformers makes no model", lambda folder: _edit(folder / "config.json", rope_scaling=7))
    broken("no weights", "no weights", lambda folder: (folder / WEIGHTS).unlink())
    broken("pickled", "pytorch_model.bin), which can run", pickled)
    broken("gguf", "python -m helix gguf", lambda folder: (folder / WEIGHTS).rename(folder / "model.gguf"))
    broken("truncated", "not a whole safetensors file", truncate)
    broken("noise", "not a whole safetensors file", lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 500))
    broken("missing", f"lacks {query}, which", stored(lambda held: held.pop(query)))
    broken("unknown", "has model.norm.bias, for which", stored(lambda held: held.update({"model.norm.bias": _ONE})))
    broken("deeper", "has model.layers.2.mlp.x, for", stored(lambda held: held.update({"model.layers.2.mlp.x": _ONE})))
    broken("wide", f"has {query} as [48, 32], and", stored(lambda held: held.update({query: torch.zeros(48, 32)})))
    broken("flat", f"has {query} as [32], and", stored(lambda held: held.update({query: torch.zeros(32)})))
    broken("quantized", f"{query} as I8;", stored(lambda held: held.update({query: held[query].to(torch.int8)})))
    broken(
        "untied", "ties lm_head.weight to", stored(lambda held: held.update({"lm_head.weight": torch.ones(67, 32)}))
    )
    broken("no shard", "lacks model-0000", lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "sharded")
    broken("no map", "no weight_map", lambda folder: (folder / INDEX).write_text("{}"), "sharded")
    broken("elsewhere", "not a file of its own", lambda f: index(f, **{query: "../whole/" + WEIGHTS}), "sharded")
    broken(
        "misplaced", f"lacks {query}, of", lambda f: index(f, **{query: "model-00004-of-00004.safetensors"}), "sharded"
    )
    broken("family", "does not partition whisper", lambda folder: _edit(folder / "config.json", model_type="whisper"))
    broken("experts", "4 of", lambda folder: _lose_expert(folder))
    return expected | {"nowhere": "there is no folder"}


_ONE = torch.ones(1)


def _lose_expert(folder: Path) -> None:
    tiny("mixtral").save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / WEIGHTS)


def _refusals(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    expected: list[dict[str, str]] = [{}]
    if dist.get_rank() == 0:
        expected = [_break(root)]
    dist.broadcast_object_list(expected)
    mesh, said = Mesh(Grid(2, 1)), {}
    for name in expected[0]:
        try:
            load(root / name, mesh)
        except (CheckpointError, PartitionError) as reason:
            said[name] = str(reason)
    try:
        load(root / "whole", mesh, torch.int8)
    except CheckpointError as reason:
        said["dtype"] = str(reason)
    try:
        load(root / "whole", Mesh(Grid(1, 2), data=1))
        load(root / "whole", Mesh(Grid(m=1, n=1), data=2), schedule="sideways")
    except PartitionError as reason:
        said["schedule"] = str(reason)
    return expected[0] | {"dtype": "weights are held in float32", "schedule": "sideways"}, said


def test_what_cannot_be_loaded_is_told_on_every_rank(tmp_path: Path) -> None:
    for expected, said in on_ranks(2, _refusals, tmp_path):
        for name, words in expected.items():
            assert words in said.get(name, "nothing"), name
            assert "\n" not in said[name]


def _peak(folder: Path, grid: Grid) -> tuple[int, int, int]:
    """Growth of the resident set while a model of 110 MB is loaded, and then saved; bytes of the rank's weights."""
    logging.disable_progress_bar()
    sizes = {"vocab_size": 12_000, "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64)
    _once(lambda: LlamaForCausalLM(config).save_pretrained(folder))
    mesh = Mesh(grid)
    empty(folder)  # what is imported at the first call is the interpreter's
    dist.barrier()
    peak = PeakMemory(torch.device("cpu"))
    model = load(folder, mesh)
    loading = peak.growth()
    peak = PeakMemory(torch.device("cpu"))
    save(model, folder.with_name("saved"))
    return loading, peak.growth(), sum(parameter.nbytes for parameter in model.parameters())


def test_no_rank_ever_holds_much_more_than_its_share(tmp_path: Path) -> None:
    found = on_ranks(4, _peak, tmp_path / "wide", Grid(4, 1))
    total = (tmp_path / "wide" / WEIGHTS).stat().st_size
    assert total > 80e6
    for loading, saving, held in found:
        assert held / (total / 4) == pytest.approx(1, abs=0.02)
        assert loading < 2 * total / 4
        assert saving < total / 4  # beside the share: rank 0's blocks, and its draft's pages are not its own
