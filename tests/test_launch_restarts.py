"""Ranks that were killed start again, all of them and as often as was said; ranks that raised do not."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import active_children, popen_fork
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from helix.ranks.launch import RankError, Restart, first_said, launch, restarted
from helix.ranks.process_group import _agree


def summed(value: float) -> float:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return float(total)


def starts(folder: Path) -> int:
    """How often rank 0 has been started."""
    return len(list(folder.iterdir()))


def note_start(folder: Path) -> int:
    """The number of this rank's start, from 0 on."""
    number = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if dist.get_rank() == 0:
        (folder / f"start-{number}").touch()
    return number


def until(last: int, folder: Path, number: int, rank: int) -> tuple[object, ...]:
    """A rank is killed in each start before the last one."""
    start = note_start(folder)
    total = summed(dist.get_rank() + start)
    said = first_said("start", f"in {start}"), first_said(f"start {start}", "new")
    if start < last and dist.get_rank() == rank:
        os.kill(os.getpid(), number)
    return restarted(), *said, total, summed(1)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 0), (signal.SIGSEGV, 2), (signal.SIGTERM, 1)])
def test_all_ranks_start_again(tmp_path: Path, number: int, rank: int) -> None:
    results = launch(until, 2, tmp_path, number, rank, ranks=3, timeout_s=20, max_restarts=2)
    died = f"was killed by {signal.Signals(number).name} during start"
    reason = f"rank {rank} (host {socket.gethostname()}) {died}; the other ranks were stopped"
    # The sum of 2 + 3 + 4: nothing of the starts before is in it.
    assert results == [(Restart(2, reason), ("in 0", Restart(2, reason)), ("new", None), 9.0, 3.0)] * 3
    assert starts(tmp_path) == 3


def test_the_last_death_ends_it(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 \(host .*\) was killed by SIGKILL during start") as caught:
        launch(until, 9, tmp_path, signal.SIGKILL, 1, ranks=2, timeout_s=20, max_restarts=1)
    assert caught.value.rank == 1
    assert starts(tmp_path) == 2


def raise_on_start(wrong: int, folder: Path) -> None:
    start = note_start(folder)
    if dist.get_rank() == 1:
        if start == wrong:
            raise LookupError(f"start {start}")
        os._exit(3)
    summed(1)


@pytest.mark.parametrize("wrong", [0, 1])
def test_an_error_is_raised_and_not_repeated(tmp_path: Path, wrong: int) -> None:
    """Also when it follows a death, whose echo in rank 0 was an error too."""
    with pytest.raises(LookupError, match=f"start {wrong}"):
        launch(raise_on_start, wrong, tmp_path, ranks=2, timeout_s=20, max_restarts=2)
    assert starts(tmp_path) == wrong + 1


def test_a_rank_killed_before_it_connects_leaves_the_next_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = dist.init_process_group

    def killed_first(*args: object, **options: object) -> None:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        connect(*args, **options)

    monkeypatch.setattr(dist, "init_process_group", killed_first)
    assert launch(summed, 1.0, ranks=3, timeout_s=20, max_restarts=1) == [3.0] * 3


def test_ranks_that_are_early_do_not_take_an_earlier_starts_name() -> None:
    store, names = dist.HashStore(), []
    for _ in range(2):

        def one(rank: int) -> str:
            time.sleep(0 if rank else 0.2)
            return _agree(store, rank, 3, timedelta(seconds=5))[0]

        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(one, range(3)))
        assert len(found) == 1
        names += found
    assert names[0] != names[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_restart_ends_it(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Also between two forks, where elastic has not yet counted the ranks that are there."""
    fork, forks = popen_fork.Popen._launch, []

    def slow_again(self: object, process: object) -> None:
        forks.append(self)
        if len(forks) == 4:  # the second rank of the second start
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            time.sleep(5)
        fork(self, process)

    monkeypatch.setattr(popen_fork.Popen, "_launch", slow_again)
    begin, before = time.monotonic(), set(psutil.Process().children())
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        launch(lambda: os.kill(os.getpid(), signal.SIGKILL), ranks=2, max_restarts=5)
    assert caught.type is KeyboardInterrupt or caught.value.code == 128 + number
    assert time.monotonic() - begin < 4
    assert len(forks) == 4
    assert not active_children()
    assert set(psutil.Process().children()) <= before
