"""Ranks start, return, fail and end as one function call would, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import popen_fork
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from helix.comm.launch import RankError, launch, launched_ranks

ROOT = Path(__file__).resolve().parents[1]


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
    assert launched_ranks() is None


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
    assert min(float((tmp_path / str(rank)).read_text()) for rank in range(3)) >= max(connected) - 0.2  # of 0.5 s between two


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
    with pytest.raises(RankError, match=f"^rank {rank} was killed by SIGKILL") as caught:
        on_ranks(4, kill_own, rank, signal.SIGKILL)
    assert caught.value.rank == rank
    assert time.monotonic() - start < 5


def test_a_crashed_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 was killed by SIGSEGV"):
        on_ranks(2, kill_own, 1, signal.SIGSEGV)


def test_a_rank_that_exits_is_named_with_its_code() -> None:
    def leave() -> None:
        if dist.get_rank() == 1:
            os._exit(3)
        time.sleep(20)

    with pytest.raises(RankError, match="rank 1 ended with exit code 3") as caught:
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


@pytest.mark.parametrize("ranks", [0, -2])
def test_fewer_than_one_rank_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"launch needs at least one rank, not {ranks}"):
        launch(barrier_or_hang, ranks=ranks)


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="4096 ranks need 4096 GPUs; this machine has"):
        launch(barrier_or_hang, ranks=4096, device="cuda")


def test_a_different_number_of_running_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched_ranks() == 2
    with pytest.raises(ValueError, match="16 ranks were asked for, and 2 are running"):
        launch(barrier_or_hang, ranks=16)


def test_slurm_tasks_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun's variables become torchrun's, and the ranks are taken as given."""
    slurm = {"PROCID": "1", "NTASKS": "4", "LOCALID": "1", "JOB_ID": "7", "NTASKS_PER_NODE": "2"}
    for key, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(key, "")  # so that monkeypatch takes them away again
        monkeypatch.delenv(key)
    assert launched_ranks() == 4
    with pytest.raises(ValueError, match="3 ranks were asked for, and 4 are running"):
        launch(barrier_or_hang, ranks=3)
    adopted = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert adopted == {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for key in (*adopted, "MASTER_PORT"):
        os.environ.pop(key)


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    path.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom helix import launch\n{body}")
    return path


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_rank_outlives_its_launcher(tmp_path: Path, number: int) -> None:
    # One write, so that the ranks' lines stay whole.
    body = "def stay():\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(60)\nlaunch(stay, ranks=3)"
    # Its standard error goes to a file: a pipe that nobody reads could hold it up.
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, script(tmp_path, body)], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout
    pids = [int(process.stdout.readline()) for _ in range(3)]
    assert all(map(alive, pids))
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=10) != 0
    while any(map(alive, pids)) and time.monotonic() - start < 10:
        time.sleep(0.05)
    process.stdout.close()
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_under_torchrun_the_ranks_are_taken_as_given(tmp_path: Path) -> None:
    body = (
        "import torch.distributed as dist\n"
        "def ids(word):\n    return (word, dist.get_rank(), os.getpid())\n"
        "found = launch(ids, 'hello', ranks=2)\n"
        "assert found[int(os.environ['RANK'])][2] == os.getpid()  # no fork\n"
        "say = lambda text: os.write(1, (text + '\\n').encode())  # one write, so that lines stay whole\n"
        "say(' '.join(f'{word}{rank}' for word, rank, _ in found))\n"
        "try:\n    launch(ids, 'hello', ranks=3)\n"
        "except ValueError as error:\n    say(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script(tmp_path, body)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        *["3 ranks were asked for, and 2 are running"] * 2,
        *["hello0 hello1"] * 2,
    ]
