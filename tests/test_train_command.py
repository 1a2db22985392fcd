"""`train.py` end to end, as a user runs it, and how it ends."""

from __future__ import annotations

import importlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from commands import Command
from ranks import on_ranks
from test_train import ROOT, configured
from wandb_runs import wandb_records

from helix.config.schema import Misfit
from helix.config.train_schema import TrainConfig
from helix.partition.grid import PartitionError
from helix.partition.options import AttentionOptions
from helix.study.tracking import Tracker
from helix.training.curves import Curves
from helix.training.learner import LanguageModel
from helix.training.report import TrainReport
from helix.training.resuming import Beginning
from helix.training.run import _rank, train

Start = Callable[..., Command]
SMALL = [
    "model.layers=2", "model.width=32", "model.heads=4", "model.head_dim=8", "model.mlp_hidden=48", "data.seq_len=24",
    "data.batch_size=4", "data.validation_batches=2", "data.limit_bytes=200000", "trainer.max_steps=8",
    "trainer.validate_every_n_steps=5", "trainer.log_every_n_steps=3", "optimizer.warmup_steps=2", "logger=none",
]  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `train.py` in the test's folder; nothing that it started outlives the test."""
    started: list[Command] = []

    def run(*overrides: str) -> Command:
        started.append(Command("train.py", f"hydra.run.dir={tmp_path / 'run'}", *SMALL, *overrides))
        return started[-1]

    yield run
    for process in started:
        process.kill()  # the ranks die with it
        process.communicate()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer=adam", "train.py: error: there is no optimizer=adam (did you mean adamw?); choose one of: "),
        ("trainer.maxsteps=3", "train.py: error: there is no key trainer.maxsteps (did you mean trainer.max_steps?)"),
    ],
)
def test_a_misspelt_key_is_one_sentence(override: str, said: str, start: Start, tmp_path: Path) -> None:
    process = start(override)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_a_report_and_its_curves(start: Start, tmp_path: Path) -> None:
    process = start("parallel=helix_2x1", "logger=wandb")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    report = json.loads((tmp_path / "run" / "train_report.json").read_text())
    assert report["method"]["name"] == "helix_2x1"
    assert report["method"]["schedule"]["prefill"] not in (None, "auto")
    assert report["steps"] == len(report["losses"]) == 8
    assert [each["step"] for each in report["validations"]] == [5, 8]
    assert report["validation_bpb"] == report["validations"][-1]["bpb"]
    assert 4 < report["unigram_entropy_bpb"] < 5
    assert len(report["settings"]) == 12
    assert (tmp_path / "run" / "curves.png").is_file()
    assert "held-out text" in out
    records = wandb_records(tmp_path / "run" / report["wandb"]["path"])
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["_step"] for item in history] == list(range(1, 9))
    assert [item["train/loss"] for item in history] == report["losses"]
    validations = {item["_step"]: item["validation/bpb"] for item in history if "validation/bpb" in item}
    assert validations == {each["step"]: each["bpb"] for each in report["validations"]}
    assert records[-1]["exit"]["exit_code"] == 0


def test_what_no_check_foresaw_of_a_layer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unforeseen(*_: Any, **__: Any) -> None:
        raise PartitionError("this grid does not go")

    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py", f"hydra.run.dir={tmp_path}", *SMALL])
    monkeypatch.setattr("helix.training.run.launch", unforeseen)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("train").main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "train.py: error: this grid does not go\n"


@pytest.mark.parametrize("parallel", [["parallel=single"], ["parallel=dp16", "parallel.data=2"]])
@pytest.mark.parametrize("option", ["aggregate=concat", "projection=block"])
def test_single_and_data_take_the_options_of_a_grid(parallel: list[str], option: str) -> None:
    with pytest.raises(PartitionError, match=rf"{option} needs heads \* head_dim = width"):
        configured(*parallel, f"parallel.{option}", "model.head_dim=16")
    configured(*parallel, f"parallel.{option}")


def test_sharing_out_the_state_makes_a_training_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ["parallel=helix_2x1", "parallel.data=4", "device=cpu", "model.width=1024", "model.mlp_hidden=4096"]
    monkeypatch.setattr("helix.config.environment.free_memory_bytes", lambda: 900e6)
    with pytest.raises(Misfit, match=r"; take parallel\.shard_data=true, model=tiny, or a smaller"):
        configured(*grid)
    configured(*grid, "parallel.shard_data=true")
    with pytest.raises(Misfit, match="; take model=tiny, or a smaller"):
        configured(*grid, "parallel.shard_data=true", "model.layers=20")


def _in_the_first_folder(
    of_first: TrainConfig, sharded: TrainConfig, folder: Path
) -> tuple[TrainReport | None, list[float], set[str]]:
    """A training whose ranks were started in another folder than the first time, and one with its state shared out."""
    text = bytes(range(256)) * 200
    report = _rank(of_first, folder / "second", "cpu", "now", text)
    trained = train(sharded, "cpu", text, Tracker(None, None), Beginning(folder, None, None))
    axes = {axis for p in trained.module.parameters() for axis in p.device_mesh.mesh_dim_names}
    return report, trained.curves.losses, axes


def test_curves_are_drawn_in_the_first_folder_and_replicas_share_the_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("helix.training.run.begin", lambda *_: Beginning(tmp_path / "first", None, None))
    one = ["parallel=dp16", "parallel.data=2", "precision=64-true"]
    cases = configured(*one), configured(*one, "parallel.shard_data=true")
    (report, losses, axes), _ = on_ranks(2, _in_the_first_folder, *cases, tmp_path)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["curves.png", "train_report.json"]
    assert not (tmp_path / "second").exists()
    assert "data" in axes
    assert report is not None
    np.testing.assert_allclose(losses, report.losses, rtol=1e-10)


class OnGpu(LanguageModel):
    device = torch.device("cuda")


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is done at once; what it has told the GPU to do takes a second in a batch, and ten before it."""
    clock, told = [0.0], [0.0]
    trainer: Any = None

    def synchronize(device: torch.device) -> None:
        clock[0] += told[0]
        told[0] = 0

    monkeypatch.setattr("helix.training.curves.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    one = configured("trainer.accumulate_grad_batches=4")
    curves, module = Curves(one, Tracker(None, None)), OnGpu(one, AttentionOptions())
    for batch in range(3):
        told[0] += 10
        curves.on_train_batch_start(trainer, module, None, batch)
        told[0] += 1
        curves.on_train_batch_end(trainer, module, None, None, batch)
    assert curves.training_s == 2  # of the second and the third


def _ranks(process: Command) -> list[psutil.Process]:
    """The ranks, once they are at work."""
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while not (len(parent.children()) >= 2 and all(each.cpu_times().user > 1 for each in parent.children())):
        assert time.monotonic() < deadline, "no ranks"
        time.sleep(0.1)
    return sorted(parent.children(), key=lambda each: each.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_training_leaves_no_process(number: int, start: Start) -> None:
    process = start("parallel=helix_2x1", "trainer.max_steps=100000")
    ranks = _ranks(process)
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_rank_ends_the_training_with_a_sentence(start: Start) -> None:
    process = start("parallel=helix_2x1", "trainer.max_steps=100000")
    _ranks(process)[1].kill()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.fullmatch(
        r"train.py: error: rank 1 \(host .*\) was killed by SIGKILL during .*; the other ranks were stopped\n", err
    )
