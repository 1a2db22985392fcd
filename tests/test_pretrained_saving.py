"""Saving a partitioned model as a Hugging Face folder: the files of the whole model's own `save_pretrained`."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from helix import Grid
from helix.checkpoint.content import CheckpointError
from helix.comm.mesh import Mesh
from helix.pretrained.helixify import helixify
from helix.pretrained.loading import load
from helix.pretrained.saving import save
from tests.pretrained import FAMILIES, VOCAB, batch, error, tiny
from tests.ranks import on_ranks

SHARD = 20_000  # bytes; the tiny models have some 100,000
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _step(model: PreTrainedModel, ids: Tensor) -> None:
    """One step of plain gradient descent, large enough to change every weight."""
    logits = model(input_ids=ids).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    model.zero_grad()


def _save_all(root: Path, grid: Grid, sharded: Grid) -> dict[str, list[str]]:
    """Save every family, partitioned, and by transformers on rank 0; which files differ there."""
    logging.disable_progress_bar()
    mesh, other_mesh, first = Mesh(grid), Mesh(sharded), dist.get_rank() == 0
    differing = {}
    for family in FAMILIES:
        save(helixify(tiny(family), mesh), root / family / "parts")
        save(helixify(tiny(family), other_mesh), root / family / "sharded parts", max_shard_size=SHARD)
        if not first:
            continue
        tiny(family).save_pretrained(root / family / "whole")
        tiny(family).save_pretrained(root / family / "sharded whole", max_shard_size=SHARD)
        one, other = _contents(root / family / "parts"), _contents(root / family / "whole")
        if family not in MIXTURES:  # which experts share a file is another matter: `_read_back`
            one |= _contents(root / family / "sharded parts")
            other |= _contents(root / family / "sharded whole")
        differing[family] = sorted(name for name in one | other if one.get(name) != other.get(name))
    narrow = {"dtype": torch.bfloat16, "hidden": 40}  # 20 features of each expert, padded to 24 in 16 bits
    save(helixify(tiny("mixtral", **narrow), mesh), root / "narrow")
    if first:
        differing["narrow"] = _read_back(root / "narrow", tiny("mixtral", **narrow))
        differing |= {family: _read_back(root / family / "sharded parts", tiny(family)) for family in MIXTURES}
    dist.barrier()
    return differing


def _read_back(folder: Path, whole: PreTrainedModel) -> list[str]:
    """The tensors that transformers reads otherwise than they were."""
    read = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return [name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, read[name])]


def _trained(root: Path, grid: Grid) -> float:
    """How far from the whole model's trained weights those are that were trained in parts, saved and read."""
    mesh, ids = Mesh(grid), batch(padded=0)["input_ids"]
    model, whole = helixify(tiny("llama"), mesh), tiny("llama")
    _step(model, ids)
    _step(whole, ids)
    save(model, root / "trained")
    read = AutoModelForCausalLM.from_pretrained(root / "trained")
    pairs = zip(read.named_parameters(), whole.named_parameters(), strict=True)
    moved = error(tiny("llama").lm_head.weight, whole.lm_head.weight)
    assert moved > 1e-2, moved
    return max(error(one, other) for (_, one), (_, other) in pairs)


def _again(root: Path, grid: Grid) -> bool:
    """Save what was loaded from a saved folder, in bfloat16, with its tokenizer; and load that on another grid."""
    if dist.get_rank() == 0:
        (root / "trained" / "tokenizer.json").write_text("{}")
        (root / "trained" / "chat_template.jinja").write_text("{{ messages }}")
        (root / "trained" / "notes.md").write_text("not the tokenizer's")
    dist.barrier()
    model = load(root / "trained", Mesh(grid), torch.bfloat16)
    save(model, root / "again")
    other = load(root / "again", Mesh(Grid(1, grid.ranks)) if grid.m > 1 else Mesh(grid), torch.bfloat16)
    ids = batch(padded=0)["input_ids"]
    with torch.no_grad():
        close = error(other(input_ids=ids).logits, model(input_ids=ids).logits) < 0.05  # of bfloat16's 8 bits
    names = {path.name for path in (root / "again").iterdir()}
    return close and {"tokenizer.json", "chat_template.jinja"} <= names and "notes.md" not in names


def test_saved_parts_are_the_whole_models_files(tmp_path: Path) -> None:
    differing = on_ranks(2, _save_all, tmp_path, Grid(2, 1), Grid(1, 2))[0]
    assert differing == {name: [] for name in (*FAMILIES, "narrow")}
    assert not list(tmp_path.glob("*/.*"))


def test_saving_what_was_trained_and_loaded(tmp_path: Path) -> None:
    def work() -> tuple[float, bool]:
        logging.disable_progress_bar()
        return _trained(tmp_path, Grid(2, 1)), _again(tmp_path, Grid(2, 1))

    for deviation, whole in on_ranks(2, work):
        assert deviation < 1e-5  # of a step's gradients, added up in another order
        assert whole
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["vocab_size"] == VOCAB
    assert "helix" not in json.dumps(config)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "empty").mkdir()
    stale = tmp_path / ".new.partial"
    stale.mkdir()
    (stale / "model.safetensors").write_text("of a save that was killed")

    def work() -> list[str]:
        model, said = helixify(tiny("llama"), Mesh(Grid(2, 1))), []

        def refused(name: str, **options: str) -> None:
            try:
                save(model, tmp_path / name, **options)
            except CheckpointError as reason:
                said.append(str(reason))

        refused("full")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # as a disk that is full before the weights' end
        refused("limited")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        refused("empty")
        refused("new")
        model.generation_config.temperature = -1.0
        refused("unfit")
        model.generation_config.temperature = 1.0
        model.config.note = object()  # which only rank 0 comes to
        refused("unwritable")
        model = helixify(tiny("mixtral", hidden=40), Mesh(Grid(2, 1))).bfloat16()  # 20 features of experts, not 24
        refused("converted")
        return said

    for said in on_ranks(2, work):
        assert len(said) == 5, said
        assert "full exists" in said[0]
        assert "File too large" in said[1]
        assert "temperature" in said[2]
        assert said[3].endswith("unwritable cannot be written: Object of type object is not JSON serializable")
        assert said[4].endswith(" was cut for another dtype than torch.bfloat16; convert the model before that")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "new"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert (tmp_path / "empty" / "model.safetensors").stat().st_size > 30_000
