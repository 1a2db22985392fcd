"""Running a function on ranks: forked on this machine, or the ones that torchrun or SLURM started.

Forking shares one import of torch among all ranks (16 ranks up in about a second; 16 interpreters on two
cores need 44). The parent must not have started torch's thread pool, which does not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from helix.config.environment import started

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
# This process's connection to the launcher's store, and the number of its next process group.
_connected: list[tuple[dist.Store, int, int]] = []
_launches = itertools.count()


class RankError(RuntimeError):
    """A rank that ended without raising, such as one that was killed."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} {reason}; the other ranks were stopped")
        self.rank = rank


def launch(fn: Callable[..., T], *args: Any, ranks: int, device: str = "cpu", timeout_s: float = 600) -> list[T]:
    """Run `fn(*args)` on every rank of a fresh process group and return each rank's result, by rank.

    Args:
        fn: any function, closures included (ranks are forked); its result must pickle.
        ranks: how many. Under torchrun or SLURM it must be the number they started.
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU a rank).
        timeout_s: seconds after which a collective that waits for a missing rank gives up.

    Raises:
        ValueError: if ranks is below 1, differs from the ranks that are running, or exceeds the GPUs.
        RankError: if a rank was killed.
        KeyboardInterrupt, SystemExit: if this process is told to stop, once the ranks have ended.
        Exception: the first failing rank's own error, with its traceback as the cause.
    """
    if ranks < 1:
        raise ValueError(f"launch needs at least one rank, not {ranks}")
    _adopt_slurm()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _join(fn, args, ranks, device, timeout_s)
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"{ranks} ranks need {ranks} GPUs; this machine has {torch.cuda.device_count()}")
    return _fork(fn, args, ranks, device, timeout_s)


def agree(words: list[str]) -> list[str]:
    """Rank 0's words, on every rank that torchrun or srun started; without a launcher, one's own."""
    here = started()
    return launch(lambda: words, ranks=here.ranks)[0] if here is not None else words


def _join(fn: Callable[..., T], args: tuple[Any, ...], ranks: int, device: str, timeout_s: float) -> list[T]:
    running = int(os.environ["WORLD_SIZE"])
    if running != ranks:
        raise ValueError(f"{ranks} ranks were asked for, and {running} are running")
    with _process_group(device, timeout_s):
        result = fn(*args)
        results: list[Any] = [None] * ranks
        dist.all_gather_object(results, result)
        return results


def _fork(fn: Callable[..., T], args: tuple[Any, ...], ranks: int, device: str, timeout_s: float) -> list[T]:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"helix-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
        max_restarts=0,
        local_addr="127.0.0.1",
    )
    parent, all_forked = os.getpid(), get_context("fork").Event()
    # All ranks are on this machine. Gloo would otherwise look up the host's name, on every rank, and a slow
    # name server then holds up the start.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # Torch elastic reports a failure in three screens of log; ours is one sentence, raised below.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="helix-launch-") as folder:
        try:
            with _no_collection(), _own_handlers():
                results = elastic_launch(config, _rank_main)(fn, args, device, timeout_s, folder, parent, all_forked)
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + stopped.sigval) from None
        except ChildFailedError as failed:
            raise _first_error(failed, Path(folder)) from failed.__cause__
    return [results[rank] for rank in range(ranks)]


def _rank_main(
    fn: Callable[..., T],
    args: tuple[Any, ...],
    device: str,
    timeout_s: float,
    folder: str,
    parent: int,
    all_forked: Event,
) -> T:
    rank = int(os.environ["RANK"])
    gc.freeze()  # see _no_collection
    gc.enable()
    # The launcher's Python handlers came along with the fork. A rank that waits inside a collective runs no
    # Python, so it would outlive SIGTERM until elastic's SIGKILL, 30 s later.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _die_with(parent)
    # A rank that connects has the launcher's store thread look up its address, under a lock of the C library. A
    # rank forked at that moment would inherit the lock, held for ever; so none connects before the last is forked.
    if int(os.environ["LOCAL_RANK"]) == int(os.environ["LOCAL_WORLD_SIZE"]) - 1:
        all_forked.set()
    all_forked.wait()
    try:
        with _process_group(device, timeout_s):
            return fn(*args)
    except Exception as error:
        _keep(error, f"on rank {rank}:\n{traceback.format_exc()}", Path(folder) / f"{rank}.pickle")
        # If this is only the echo of a rank that was killed, let elastic see that one first; it reports one.
        time.sleep(0.5)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through the interpreter's end: gloo's threads are still waiting for the others, and crash in it.
        os._exit(1)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection between here and a rank's first line.

    What a rank inherits and no longer needs, such as the store of an earlier launch, must not be destroyed in it:
    the destructor would wait for a thread that only the launcher has (seen: ranks that hung or crashed at start).
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Put back the signal handlers that elastic's agent replaces and leaves."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers:
                signal.signal(number, handler)


def _own_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Keys for one process group of this process, its rank and the number of ranks.

    Ranks of torchrun's launch again for each job of a sweep. The launcher's store is then the same, and holds the
    addresses of the last group, to which a rank that is early would connect; so each group has its own keys. One
    connection serves all: without torchrun rank 0 is the server, and a new one might be taken for the old.
    """
    if not _connected:
        _connected.append(next(iter(dist.rendezvous("env://", timeout=timeout))))
    store, rank, ranks = _connected[0]
    return dist.PrefixStore(f"helix-launch-{next(_launches)}", store), rank, ranks


class _process_group:
    """The default process group for one rank's work, torn down on every way out."""

    def __init__(self, device: str, timeout_s: float) -> None:
        self.device, self.timeout = device, timedelta(seconds=timeout_s)

    def __enter__(self) -> None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        store, rank, ranks = _own_store(self.timeout)
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks, timeout=self.timeout
        )
        # One that is done early closes its connections, and would be taken for one that crashed by a late one.
        dist.barrier()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the others may be stuck in a collective, and destroying the group would wait for them.
        if kind is None and dist.is_initialized():
            dist.barrier()  # another may still be connecting a group of its own
            dist.destroy_process_group()


def _die_with(parent: int) -> None:
    """Have the kernel kill this rank when its launcher dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _keep(error: Exception, note: str, path: Path) -> None:
    """Put the error where the launcher finds it; one that does not pickle as its text."""
    try:
        error.add_note(note)
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(note)
        content = pickle.dumps(plain)
    draft = path.with_suffix(".draft")
    draft.write_bytes(content)
    draft.rename(path)  # this rank may be stopped at any time


def _first_error(failed: ChildFailedError, folder: Path) -> BaseException:
    """The error that began it: a killed rank before the connections that broke because of it."""
    for rank, failure in sorted(failed.failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            return RankError(rank, f"was killed by {signal.Signals(-failure.exitcode).name}")
    kept = sorted(folder.glob("*.pickle"), key=lambda path: path.stat().st_mtime_ns)
    if kept:
        error: BaseException = pickle.loads(kept[0].read_bytes())
        return error
    rank, failure = failed.get_first_failure()
    return RankError(rank, f"ended with exit code {failure.exitcode}")


def _adopt_slurm() -> None:
    """Give a task that srun started the variables that torchrun would have set."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or os.environ.get("SLURM_NTASKS", "1") == "1":
        return
    env = os.environ
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
        env["MASTER_ADDR"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    # One port for all tasks of a job and, as a rule, not two jobs' on one node.
    env.setdefault("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 40000))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = env.get("SLURM_NTASKS_PER_NODE", env["SLURM_NTASKS"])
