"""Checkpoints as files: one safetensors file out and in, what a manifest takes, what a stranger's may not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helix.__main__ import main
from helix.checkpoint import manifest
from helix.checkpoint.save_and_load import (
    CheckpointError,
    CheckpointWarning,
    export,
    import_,
    latest,
    load,
    save,
    verify,
)
from helix.models.plain import PlainTransformer
from helix.partition.shape import TransformerShape

WEIGHTS = {
    "b": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a": torch.arange(5).to(torch.bfloat16),
    "one": torch.tensor(3.5),
    "none": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
}


def _helix(*args: object) -> None:
    main(["checkpoint", *map(str, args)])


def test_export_import_export_is_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    save(tmp_path / "run", model, [optimizer])
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    _helix("export", tmp_path / "run", first)  # the folder's newest
    assert "exported" in capsys.readouterr().out
    _helix("import", first, tmp_path / "again")
    assert "imported" in capsys.readouterr().out
    assert export(tmp_path / "again", second) == second.stat().st_size
    assert first.read_bytes() == second.read_bytes()
    whole = load_file(first)
    assert whole.keys() == model.state_dict().keys()  # buffers too, and no optimizer state
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    _helix("verify", tmp_path / "again")
    assert "is whole: 7 tensors" in capsys.readouterr().out


def test_every_dtype_and_empty_tensors_go_through(tmp_path: Path) -> None:
    file, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(WEIGHTS, file, metadata={"format": "pt"})
    import_(file, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out)
    assert file.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("export", "missing", "x.safetensors"), "missing does not exist"),
        (("export", "empty", "x.safetensors"), "is not a whole checkpoint: it has no manifest.json"),
        (("export", "good", "nowhere/x.safetensors"), "cannot be written"),
        (("import", "missing.safetensors", "new"), "missing.safetensors does not exist"),
        (("import", "bad.safetensors", "new"), "bad.safetensors is not a whole safetensors file"),
        (("import", "good.safetensors", "good"), "good exists; give a path that does not"),
        (("verify", "empty"), "is not a whole checkpoint"),
        (("export",), "the following arguments are required"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"no safetensors")
    save_file(WEIGHTS, tmp_path / "good.safetensors")
    import_("good.safetensors", "good")
    with pytest.raises(SystemExit) as stopped:
        _helix(*args)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert said.err.startswith("python -m helix: error: ")
    assert reason in said.err
    assert said.err.count("\n") == 1


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    for step in (10, 20, 15, 30):  # at 15 someone went back
        save(tmp_path, model, keep=3, step=step)
    names = ["00002-step-20", "00003-step-15", "00004-step-30"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert latest(tmp_path) == tmp_path / "00004-step-30"
    with pytest.raises(CheckpointError, match="keep=0 would remove"):
        save(tmp_path, model, keep=0)
    assert latest(tmp_path / "none") is None


def test_latest_passes_over_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 2)
    for step in (1, 2):
        save(tmp_path, model, step=step)
    (tmp_path / "00002-step-2" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.warns(CheckpointWarning, match=r"rank-00000\.safetensors has 0 bytes"):
        assert latest(tmp_path) == tmp_path / "00001-step-1"
    _helix("export", tmp_path, tmp_path / "x.safetensors")
    said = capsys.readouterr()
    assert said.err.startswith("python -m helix: warning: ")
    assert said.err.endswith("so this checkpoint is not loaded; 00001-step-1 is taken instead\n")


def test_verify_has_a_line_on_each_checkpoint_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [save(tmp_path, torch.nn.Linear(2, 2), step=step).path for step in (1, 2, 3)]
    second = paths[1]
    _helix("verify", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" is whole: 2 tensors")[0] for line in lines] == [str(path) for path in paths]
    (second / FILE).write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        _helix("verify", tmp_path)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out.count(" is whole: ") == 2
    assert said.err.startswith(f"python -m helix: error: {second / FILE} has 0 bytes")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("extra", [{"a": {1, 2}}, {"a": [torch.zeros(2)]}, {"a": {"b": object()}}])
def test_extra_takes_plain_values_only(tmp_path: Path, extra: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"extra\.a.* is a \w+, and a checkpoint takes only"):
        save(tmp_path, torch.nn.Linear(2, 2), extra=extra)


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    extra = {"a": [1, 0.1 + 0.2, None, True], "b": {3: "x", 4: [float("inf")]}, "c": {}, "d": "ü"}
    path = save(tmp_path, torch.nn.Linear(2, 2), extra=extra).path
    assert verify(path).about.extra == extra


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, torch.nn.Linear(2, 2), extra={"a": 1}).path
    assert {file.name for file in path.iterdir()} == {"manifest.json", "rank-00000.safetensors"}


def _reseal(path: Path, change: dict[str, object]) -> None:
    """A stranger's manifest: altered, with a checksum that is right."""
    body = json.loads((path / manifest.FILE).read_text()) | change
    del body["sha256"]
    (path / manifest.FILE).write_text(manifest.seal(body))


FILE = "rank-00000.safetensors"


def _tensor(shape: list[object], *chunks: tuple[list[object], list[object]], dtype: object = "float32") -> object:
    """The tensors of a manifest whose one, of 2 x 2 in truth, is described like this."""
    return {"tensors": {"w": {"dtype": dtype, "shape": shape, "chunks": [[FILE, *chunk] for chunk in chunks]}}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"files": {"../../etc/passwd": {"sha256": "", "nbytes": 1}}},
            "'../../etc/passwd' is no name of a file in it",
        ),
        ({"files": {"/etc/x.safetensors": {"sha256": "", "nbytes": 1}}}, "is no name of a file in it"),
        ({"files": {FILE: {"sha256": "", "nbytes": -1}}}, "-1 is no size"),
        ({"format": "helix-checkpoint-9"}, "is of format 'helix-checkpoint-9', and this Helix reads"),
        ({"tensors": {"w": 3}}, "is not what was written"),
        ({"tensors": {"w": {"dtype": "float32", "shape": [1], "chunks": [["x", [0], [1]]]}}}, "not listed"),
        (_tensor([9]), "the pieces of w do not make it up"),
        (_tensor([2, 2], ([0, 0], [1, 2]), ([0, 0], [1, 2])), "the pieces of w do not make it up"),  # overlap
        (_tensor([2, 2], ([0, 0], [1, 2]), ([1, 1], [1, 2])), "the pieces of w do not make it up"),  # stick out
        (_tensor([2, 2], ([0], [4])), "the pieces of w do not make it up"),
        (_tensor([2, 2], ([-1, 0], [2, 2])), "-1 is no size"),
        (_tensor([-2, -2], ([0, 0], [2, 2])), "-2 is no size"),
        (_tensor([2.0, 2], ([0, 0], [2, 2])), "2.0 is no size"),
        (_tensor([10**30], ([0], [10**30])), "is no size"),
        (_tensor([10**12], ([0], [10**12])), "bytes, and the tensors in it have 4000000000000"),
        (_tensor([1] * 40, ([0] * 40, [1] * 40)), "a list of at most 8 numbers"),
        (_tensor([2, 2], ([0, 0], [2, 2]), dtype="serialization"), "w is of dtype 'serialization'"),
        ({"about": {"surprise": 1}}, "is not what was written"),
        ({"about": {"step": "many"}}, "'many' is no size"),
        ({"about": {"optimizers": [{"type": "AdamW", "groups": [{"params": []}]}]}}, "an optimizer that is none"),
    ],
)
def test_a_strangers_manifest_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = save(tmp_path, torch.nn.Linear(2, 2)).path
    _reseal(path, _tensor([2, 2], ([0, 0], [1, 2]), ([1, 0], [1, 2])))
    verify(path)
    _reseal(path, change)
    with pytest.raises(CheckpointError) as refused:
        verify(path)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_strangers_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, PlainTransformer(TransformerShape(1, 8, 2, 2, 4, 8, vocab=4))).path
    about = json.loads((path / manifest.FILE).read_text())["about"]
    load(path, PlainTransformer(TransformerShape(1, 8, 2, 2, 4, 8, vocab=4)))
    for wrong in ({"layers": "1"}, {"layers": 0}, {"kv_heads": None}):
        about["models"][""]["shape"] |= wrong
        _reseal(path, {"about": about})
        with pytest.raises(CheckpointError, match="what the checkpoint says of its model makes no sense"):
            load(path, PlainTransformer(TransformerShape(1, 8, 2, 2, 4, 8, vocab=4)))


def test_a_tied_weight_is_kept_once(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert set(verify(save(tmp_path, model).path).tensors) == {"a.weight"}
