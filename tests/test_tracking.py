"""A W&B run holds what was logged, however its rank ends.

Each case forks a rank, as `launch` does, since only a forked rank skips the interpreter's own clean-up.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from wandb_runs import wandb_records

from helix.config.schema import LoggerConfig
from helix.study.tracking import Tracker, track

RECORDS = 3
FORK = multiprocessing.get_context("fork")
OFFLINE = LoggerConfig(kind="wandb", mode="offline", project="helix", group="tests")


def start(directory: Path, then: Callable[[Tracker], None]) -> BaseProcess:
    """Fork a process that logs three records, says so, and goes on with `then` inside the run."""
    ready = FORK.Event()

    def rank() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the traceback of the error that a case raises on purpose
        with track(OFFLINE, directory, {"seed": 7}) as tracker:
            for step in range(RECORDS):
                tracker.log({"loss": 1.0 / (step + 1)}, step=step)
            ready.set()
            then(tracker)

    process = FORK.Process(target=rank)
    process.start()
    assert ready.wait(30)
    return process


def end(process: BaseProcess) -> int | None:
    process.join(20)
    try:
        return process.exitcode
    finally:
        process.kill()
        process.join()


def of(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def check(directory: Path, exit_code: int) -> list[dict[str, Any]]:
    """All three records are there, in order, and the run ended with this code."""
    (run,) = directory.glob("wandb/offline-run-*")
    found = wandb_records(run)
    assert [item["item"]["loss"] for item in of("history", found)] == [1.0 / (step + 1) for step in range(RECORDS)]
    assert [item["exit_code"] for item in of("exit", found)] == [exit_code]
    assert of("run", found)[0]["config"]["update"]["seed"] == 7
    return found


def join_gloo(directory: Path, rank: int) -> None:
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))


def peer(directory: Path) -> None:
    """A second rank, alive, that never comes to the barrier."""
    join_gloo(directory, rank=1)
    time.sleep(30)


def wait_in_gloo(directory: Path) -> None:
    """Wait, in C++, for the second rank."""
    join_gloo(directory, rank=0)
    (directory / "blocked").touch()
    dist.barrier()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_returns(tmp_path: Path) -> None:
    assert end(start(tmp_path, lambda tracker: tracker.summary({"tokens_per_s": 12.5}))) == 0
    updates = [item["update"] for item in of("summary", check(tmp_path, exit_code=0))]
    assert {"tokens_per_s": 12.5} in updates


def test_raises(tmp_path: Path) -> None:
    def fail(_: Tracker) -> None:
        raise RuntimeError("on purpose")

    assert end(start(tmp_path, fail)) == 1
    check(tmp_path, exit_code=1)


def test_exits(tmp_path: Path) -> None:
    assert end(start(tmp_path, lambda _: sys.exit(3))) == 3
    check(tmp_path, exit_code=3)


# Those of helix/study/tracking.py: 5 s to finish the run, after 1 s to unwind where it was Ctrl-C.
@pytest.mark.parametrize(("signum", "limit_s"), [(signal.SIGTERM, 5), (signal.SIGINT, 6)])
def test_is_told_to_end_while_blocked_in_a_collective(tmp_path: Path, signum: signal.Signals, limit_s: float) -> None:
    other = FORK.Process(target=peer, args=(tmp_path,))
    other.start()
    process = start(tmp_path, lambda _: wait_in_gloo(tmp_path))
    wait_for(tmp_path / "blocked")
    time.sleep(0.3)  # from the line before the barrier into it
    assert process.pid is not None
    os.kill(process.pid, signum)
    began = time.monotonic()
    assert end(process) == 128 + signum
    assert time.monotonic() - began < limit_s
    other.kill()
    other.join()
    check(tmp_path, exit_code=128 + signum)


def test_is_told_to_end_while_in_python(tmp_path: Path) -> None:
    process = start(tmp_path, lambda _: time.sleep(30))
    process.terminate()
    assert end(process) == 128 + signal.SIGTERM
    check(tmp_path, exit_code=128 + signal.SIGTERM)


def test_a_signal_to_a_child_is_not_one_to_the_run(tmp_path: Path) -> None:
    def with_a_child(_: Tracker) -> None:
        child = FORK.Process(target=time.sleep, args=(30,))
        child.start()
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
        time.sleep(0.2)  # what the watcher would need to hear of it

    assert end(start(tmp_path, with_a_child)) == 0
    check(tmp_path, exit_code=0)


def test_leaves_signals_as_they_were(tmp_path: Path) -> None:
    def rank() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with track(OFFLINE, tmp_path, {}):
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before
        assert signal.set_wakeup_fd(-1) == -1

    process = FORK.Process(target=rank)
    process.start()
    assert end(process) == 0


def test_lightnings_logger_writes_to_the_same_run(tmp_path: Path) -> None:
    def through_lightning(tracker: Tracker) -> None:
        from lightning.pytorch.loggers import WandbLogger

        logger = WandbLogger(experiment=tracker.experiment)
        logger.log_hyperparams({"precision": "32-true"})
        logger.log_metrics({"tokens_per_s": 5.0}, step=RECORDS)
        logger.finalize("success")

    assert end(start(tmp_path, through_lightning)) == 0
    found = check(tmp_path, exit_code=0)
    assert of("history", found)[-1]["item"]["tokens_per_s"] == 5.0
    assert {"precision": "32-true"} in [item["update"] for item in of("config", found)]


def test_knows_where_it_writes(tmp_path: Path) -> None:
    def leave_a_note(tracker: Tracker) -> None:
        (tmp_path / "note").write_text(json.dumps([tracker.mode, str(tracker.path), tracker.id]))

    end(start(tmp_path, leave_a_note))
    mode, path, run_id = json.loads((tmp_path / "note").read_text())
    assert mode == "offline"
    assert Path(path).parent == tmp_path / "wandb"
    assert (Path(path) / f"run-{run_id}.wandb").exists()


def test_kind_none_does_nothing(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with track(LoggerConfig(kind="none"), tmp_path, {}) as tracker:
        tracker.log({"loss": 1.0}, step=0)
        tracker.summary({"loss": 1.0})
        assert (tracker.experiment, tracker.path, tracker.id, tracker.mode) == (None, None, None, None)
        assert signal.getsignal(signal.SIGTERM) is handler
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_begins_a_new_history_and_a_restarted_one_goes_on(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"

    def log(restarted: bool, *errors: Exception) -> None:
        with track(LoggerConfig(kind="none"), tmp_path, {}, restarted) as tracker:
            tracker.log({"loss": 1.0}, step=0)
            for error in errors:
                raise error

    for restarted, lines in ((False, 1), (True, 2), (False, 1)):
        with pytest.raises(LookupError):
            log(restarted, LookupError())
        assert len(history.read_text().splitlines()) == lines
    log(True)
    assert not history.exists()
