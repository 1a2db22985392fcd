"""Ranks start, return, fail and end as one function call would, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import popen_fork
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from helix.config.environment import started
from helix.ranks.launch import RankError


def barrier_or_hang() -> None:
    dist.all_reduce(torch.ones(1))


@pytest.fixture(autouse=True)
def no_process_left() -> object:
    """Whatever a test does to its ranks, none is running afterwards."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(list(left), timeout=1)
    assert not alive


def test_results_come_back_by_rank() -> None:
    offset = 100  # a closure: ranks are forked
    assert on_ranks(4, lambda factor: offset + factor * dist.get_rank(), 2) == [100, 102, 104, 106]


def test_one_rank_is_a_launch_too() -> None:
    assert on_ranks(1, lambda: (dist.get_rank(), dist.get_world_size(), os.getpid() != parent)) == [(0, 1, True)]


parent = os.getpid()


def test_a_launch_leaves_the_caller_as_it_was() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        on_ranks(2, barrier_or_hang)
        assert [signal.getsignal(number) for number in numbers] == [signal.default_int_handler] * len(numbers)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    assert not dist.is_initialized()
    assert "RANK" not in os.environ
    assert started() is None


def test_ranks_connect_only_when_all_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that connects has the launcher's store thread look up its address, under the C library's lock.

    A rank forked at that moment would inherit the lock, held for ever. So none may connect before the last fork.
    """
    forked, connected = [0.0], [0.0]
    fork, connect = popen_fork.Popen._launch, dist.init_process_group

    def slow_fork(self: object, process: object) -> None:
        time.sleep(0.3)
        forked[0] = time.monotonic()
        fork(self, process)

    def timed_connect(*args: object, **options: object) -> None:
        connected[0] = time.monotonic()
        connect(*args, **options)

    monkeypatch.setattr(popen_fork.Popen, "_launch", slow_fork)
    monkeypatch.setattr(dist, "init_process_group", timed_connect)
    times = on_ranks(3, lambda: (barrier_or_hang(), forked[0], connected[0])[1:])
    assert max(at for at, _ in times) <= min(at for _, at in times)


def test_no_rank_leaves_before_all_have_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is done early closes its connections, and would be taken for one that crashed."""
    connect, destroy = dist.init_process_group, dist.destroy_process_group

    def uneven_connect(*args: object, **options: object) -> None:
        connect(*args, **options)
        time.sleep(0.5 * int(os.environ["RANK"]))

    def timed_destroy() -> None:
        (tmp_path / os.environ["RANK"]).write_text(str(time.monotonic()))
        destroy()

    monkeypatch.setattr(dist, "init_process_group", uneven_connect)
    monkeypatch.setattr(dist, "destroy_process_group", timed_destroy)
    connected = on_ranks(3, time.monotonic)
    assert (
        min(float((tmp_path / str(rank)).read_text()) for rank in range(3)) >= max(connected) - 0.2
    )  # of 0.5 s between two


class Garbage:
    """A cycle that only the garbage collector frees, and that leaves a mark where it is freed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cycle = folder, self

    def __del__(self) -> None:
        (self.folder / str(os.getpid())).touch()


def test_ranks_do_not_free_the_launchers_garbage(tmp_path: Path) -> None:
    """An earlier launch's store has a thread, which a forked rank has not: freeing it there hangs or crashes."""
    gc.disable()
    try:
        Garbage(tmp_path)
        on_ranks(2, gc.collect)
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


class OwnError(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code


def fail_on(rank: int, error: Callable[[], Exception]) -> None:
    """One rank raises; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        raise error()
    barrier_or_hang()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_ranks_own_error_reaches_the_caller(rank: int) -> None:
    start = time.monotonic()
    with pytest.raises(OwnError, match="no such head") as caught:
        on_ranks(3, fail_on, rank, lambda: OwnError("no such head", 7))
    assert time.monotonic() - start < 5
    assert caught.value.code == 7
    (note,) = caught.value.__notes__
    assert note.startswith(f"on rank {rank}:\nTraceback")
    assert "raise error()" in note


def test_an_error_on_every_rank_is_raised_once() -> None:
    def fail() -> None:
        raise ValueError("the same everywhere")

    with pytest.raises(ValueError, match="the same everywhere") as caught:
        on_ranks(3, fail)
    assert len(caught.value.__notes__) == 1


class Unpicklable(RuntimeError):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.hook = lambda: None


class TwoArguments(RuntimeError):
    """Pickles, but doesn't unpickle: its __init__ wants more than its args say."""

    def __init__(self, message: str, more: str) -> None:
        super().__init__(f"{message} {more}")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (lambda: Unpicklable("holds a lambda"), "Unpicklable: holds a lambda"),
        (lambda: TwoArguments("needs", "two"), "TwoArguments: needs two"),
    ],
)
def test_an_error_that_does_not_pickle_arrives_as_its_text(error: Callable[[], Exception], text: str) -> None:
    with pytest.raises(RuntimeError, match=text) as caught:
        on_ranks(2, fail_on, 1, error)
    assert any("on rank 1" in note for note in caught.value.__notes__)


def kill_own(rank: int, number: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), number)
    barrier_or_hang()


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_is_named_within_5_s(rank: int) -> None:
    start = time.monotonic()
    with pytest.raises(
        RankError, match=rf"^rank {rank} \(host .*\) was killed by SIGKILL during start; the"
    ) as caught:
        on_ranks(4, kill_own, rank, signal.SIGKILL)
    assert caught.value.rank == rank
    assert time.monotonic() - start < 5


def test_a_crashed_rank_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 1 \(host .*\) was killed by SIGSEGV"):
        on_ranks(2, kill_own, 1, signal.SIGSEGV)


def test_a_rank_that_exits_is_named_with_its_code() -> None:
    def leave() -> None:
        if dist.get_rank() == 1:
            os._exit(3)
        time.sleep(20)

    with pytest.raises(RankError, match=r"rank 1 \(host .*\) ended with exit code 3") as caught:
        on_ranks(2, leave)
    assert caught.value.rank == 1


def test_a_missing_collective_gives_up_in_time() -> None:
    def one_alone() -> None:
        if dist.get_rank() == 0:
            barrier_or_hang()
        else:
            time.sleep(10)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        on_ranks(2, one_alone, timeout_s=1)
    assert time.monotonic() - start < 8
