"""`train.py` end to end, as a user runs it, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.layers=2", "model.width=32", "model.heads=4", "model.head_dim=8", "model.mlp_hidden=48", "data.seq_len=24",
    "data.batch_size=4", "data.validation_batches=2", "data.limit_bytes=200000", "trainer.max_steps=8",
    "trainer.validate_every_n_steps=5", "trainer.log_every_n_steps=3", "optimizer.warmup_steps=2", "logger=none",
]  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `train.py` in the test's folder; nothing that it started outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "train.py", f"hydra.run.dir={tmp_path / 'run'}", *SMALL, *overrides]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

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
    assert "held-out text" in out
    records = _wandb_records(tmp_path / "run" / report["wandb"]["path"])
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["_step"] for item in history] == list(range(1, 9))
    assert [item["train/loss"] for item in history] == report["losses"]
    validations = {item["_step"]: item["validation/bpb"] for item in history if "validation/bpb" in item}
    assert validations == {each["step"]: each["bpb"] for each in report["validations"]}
    assert records[-1]["exit"]["exit_code"] == 0


def _wandb_records(folder: Path) -> list[dict[str, Any]]:
    file = next(folder.glob("*.wandb"))
    wandb = Path(sys.executable).with_name("wandb")
    out = subprocess.run([wandb, "leet", "inspect", "--json", file], check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def _ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
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
    assert "train.py: error: rank 1 was killed by SIGKILL; the other ranks were stopped" in err
