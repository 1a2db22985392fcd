"""Ranks of torchrun watch each other: who is lost is named, however its launcher ends the others meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from commands import ROOT

from helix.flight import activity
from helix.ranks import heartbeat, verdict
from helix.ranks.failure import RankError, stop
from helix.ranks.heartbeat import Heartbeat


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what launches before have left in this one: a phase, signals' handlers of ranks that raised."""
    monkeypatch.setattr(activity, "_phase", activity.START)
    monkeypatch.setattr(activity, "_heard", None)
    while heartbeat._raised:
        heartbeat._raised.pop().close()
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_rank_that_falls_silent_is_named_and_the_watchers_own_pause_is_not_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verdict, "SILENT_S", 1.0)
    store, ended, mute = dist.HashStore(), threading.Event(), threading.Event()
    found: list[RankError] = []

    def end(self: Heartbeat, verdict: RankError) -> None:
        if self._number == 0:
            found.append(verdict)
        ended.set()

    def say(self: Heartbeat, words: dict[str, object], whole=Heartbeat._say) -> None:
        if not (self._number == 1 and mute.is_set()):
            whole(self, words)

    for module in (heartbeat, verdict):
        monkeypatch.setattr(module, "BEAT_S", 0.2)
    monkeypatch.setattr(Heartbeat, "_end", end)
    monkeypatch.setattr(Heartbeat, "_say", say)
    both = [Heartbeat(store, number, ["here a", "here a"]) for number in range(2)]
    try:
        time.sleep(0.5)
        clock = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 60)  # as after Ctrl-Z and `fg`
        assert not ended.wait(0.8)
        mute.set()
        assert ended.wait(5)
        mute.clear()
        assert "rank 1 (host here) was lost (stopped, or cut off" in str(found[0])
        for each in both:
            each._thread.join(5)
            assert not each._thread.is_alive()
    finally:
        for each in reversed(both):
            each.leave()


@contextmanager
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Heartbeat], list[tuple[int, str]]]]:
    """Two ranks of one host in this process, and what each of them says ends it."""
    found: list[tuple[int, str]] = []
    monkeypatch.setattr(Heartbeat, "_end", lambda self, verdict: found.append((self._number, str(verdict))))
    store = dist.HashStore()
    both = [Heartbeat(store, number, ["here a", "here a"]) for number in range(2)]
    time.sleep(0.3)  # until they have met
    yield both, found
    for each in reversed(both):
        each.leave()


def close(rank: Heartbeat) -> None:
    """As the end of its process does."""
    line = rank._peers[0].line
    assert line is not None
    line.link.shutdown(2)


def ended(rank: Heartbeat, limit_s: float = 5) -> bool:
    rank._thread.join(limit_s)
    return not rank._thread.is_alive()


def test_torchruns_sigterm_may_come_before_the_death_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with two(monkeypatch) as (both, found):
        both[0]._stopped.set()
        close(both[1])
        assert ended(both[0])
        assert "rank 1 (host here) was lost (its process ended without a word) during start" in dict(found)[0]


def test_signals_are_the_processs_own_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with two(monkeypatch):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    began = time.monotonic()
    stop()
    assert time.monotonic() - began < 0.1


def test_a_rank_that_alone_was_told_to_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with two(monkeypatch) as (both, found):
        both[1]._settle()
        assert ended(both[0])
        assert "rank 1 (host here) was told to end, as by SIGTERM, during start" in dict(found)[0]


def test_of_ranks_that_all_were_told_to_end_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with two(monkeypatch) as (both, found):
        for each in reversed(both):  # at once, as no launcher waits for one of them
            each._stopped.set()
            each._wake()
        time.sleep(0.5)
        close(both[1])
        assert not ended(both[0], 1.2)
        assert not found


LOST = {
    signal.SIGKILL: "was lost (its process ended without a word)",
    signal.SIGTERM: "was told to end, as by SIGTERM,",
}


@pytest.mark.parametrize(
    ("how", "logger"), [(signal.SIGKILL, "none"), (signal.SIGKILL, "wandb"), (signal.SIGTERM, "none")]
)
def test_torchrun_on_one_host_names_who_was_lost(tmp_path: Path, how: signal.Signals, logger: str) -> None:
    small = ["model=dense", "model.layers=1", "model.width=32", "model.heads=2", "model.head_dim=16"]
    work = ["workload.batch_size=1", "workload.seq_len=8", "workload.runs=100000", f"logger={logger}"]
    command = ["infer.py", *small, *work, "parallel=helix_1x2", f"hydra.run.dir={tmp_path / 'out'}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([*torchrun, *command], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as job:
        os.kill(measuring(tmp_path, job), how)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("infer.py: error: ")]
    assert len(said) == 1, errors
    assert f"rank 1 (host {socket.gethostname()}) {LOST[how]} during " in said[0]
    assert (tmp_path / "out" / "failed.json").is_file()


def measuring(folder: Path, job: subprocess.Popen[str]) -> int:
    """The process of rank 1, once it is measuring."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and job.poll() is None:
        for record in folder.glob("torchelastic_*/*/attempt_0/1/activity"):
            pid, phase = activity.read(record)
            if phase.startswith("measurement, run"):
                return pid
        time.sleep(0.01)
    job.kill()
    raise AssertionError(job.communicate()[1])
