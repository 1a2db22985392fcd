"""Ranks forked on this machine by torch elastic, which starts all of them again when one was killed."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext

from helix.flight import activity
from helix.ranks.failure import Memory, RankError, ended, raised
from helix.ranks.process_group import ProcessGroup
from helix.ranks.rendezvous import LOOPBACK, LoopbackRendezvous

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_KILLED = "HELIX_KILLED"  # in a rank's environment: why the ranks before it were stopped
# A rank that SIGSTOP stopped, or the job control of a shell, holds up all the others: for so long it may be looked at.
_STOPPED_LIMIT_S = 10.0
_LOOK_S = 1.0
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


@dataclass(frozen=True)
class _Round:
    """What the ranks of one start share, and those of the next must not find as they left it.

    Args:
        folder: of what they raised, and of what they are doing.
        all_forked: set when the last of them is there.
        killed: why the ranks before them were stopped; empty on the first start.
        parent: the launcher's process.
    """

    folder: Path
    all_forked: Event
    killed: str
    parent: int


class _Agent(LocalElasticAgent):
    """Torch elastic's agent, but for which failures it restarts.

    A rank that was killed, or ended without raising, may do better next time. One that raised would raise again:
    same data, same weights, same random numbers. Its error ends the launch, as the last death does.
    """

    def __init__(self, spec: WorkerSpec, folder: Path) -> None:
        super().__init__(spec, DefaultLogsSpecs(str(folder)), start_method="fork", uninterruptible_state_timeout=0)
        self._folder, self._args, self._killed, self._memory = folder, spec.args, "", Memory()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=self._folder))
        self._round = _Round(folder, get_context("fork").Event(), self._killed, os.getpid())
        worker_group.spec.args = (*self._args, self._round)
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._stopped = _Stopped(list(pids.values()))
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._stopped.look()
        assert isinstance(self._pcontext, MultiprocessContext)
        assert self._pcontext._pc is not None
        # All that have ended by now: elastic tells of one, which may be an echo of the one that began it.
        ends = [process.exitcode for process in self._pcontext._pc.processes]
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():  # and all ranks have been stopped
            codes = {rank: code for rank, code in enumerate(ends) if code}
            codes |= {rank: each.exitcode for rank, each in result.failures.items()}
            lost = self._lost(codes)
            if lost is None:
                error, cause = _first_raised(self._round.folder)
                raise error from cause
            if self._remaining_restarts == 0:
                raise lost
            self._killed = str(lost)
        return result

    def _lost(self, codes: dict[int, int]) -> RankError | None:
        """The rank that died without raising, if one did: the connections of the others broke because of it."""
        for rank, code in sorted(codes.items()):
            if code > 0 and (self._round.folder / f"{rank}.pickle").exists():
                continue
            _, phase = activity.read(self._round.folder / f"{rank}.activity")
            if rank in self._stopped.killed:
                what = f"was stopped for {_STOPPED_LIMIT_S:.0f} s, as by SIGSTOP,"
                return RankError(rank, socket.gethostname(), phase, what)
            if -code in _CRASHES:
                print(file=sys.stderr)  # elastic has ranks dump their stack, which at times breaks off within a line
            return ended(rank, phase, code, self._memory)
        return None


class _Stopped:
    """Kills ranks that have been stopped for too long; one that a debugger holds is not.

    Time during which the launcher did not run is none: Ctrl-Z stops it with all its ranks, and `fg` continues them.
    """

    def __init__(self, pids: list[int]) -> None:
        self.killed: set[int] = set()
        self._pids, self._looked, self._seconds = pids, time.monotonic(), [0.0] * len(pids)

    def look(self) -> None:
        if (passed := time.monotonic() - self._looked) < _LOOK_S:
            return
        self._looked += passed
        now = [rank for rank, pid in enumerate(self._pids) if _status(pid) == psutil.STATUS_STOPPED]
        self._seconds = [
            each + min(passed, 2 * _LOOK_S) if rank in now else 0.0 for rank, each in enumerate(self._seconds)
        ]
        if max(self._seconds) >= _STOPPED_LIMIT_S:
            self.killed = {max(now, key=lambda rank: self._seconds[rank])}
            for rank in now:  # elastic would wait for the others of them, too
                os.kill(self._pids[rank], signal.SIGKILL)


def _status(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return None


def fork(
    fn: Callable[..., T], args: tuple[Any, ...], ranks: int, device: str, timeout_s: float, max_restarts: int
) -> list[T]:
    """Run `fn(*args)` on forked ranks and return each rank's result; see `helix.ranks.launch.launch`."""
    # All ranks are on this machine. Gloo would otherwise look up the host's name, on every rank, and a slow
    # name server then holds up the start.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # Torch elastic reports a failure in three screens of log; ours is one sentence, raised below.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.stdout.flush()
    sys.stderr.flush()
    # W&B's process, which ends a second after its rank, may just be writing in it.
    with tempfile.TemporaryDirectory(prefix="helix-launch-", ignore_cleanup_errors=True) as folder:
        spec = WorkerSpec(
            role="rank",
            local_world_size=ranks,
            entrypoint=_rank_main,
            args=(fn, args, device, timeout_s),
            rdzv_handler=LoopbackRendezvous(f"helix-{os.getpid()}"),
            max_restarts=max_restarts,
            monitor_interval=0.1,
            local_addr=LOOPBACK,
        )
        try:
            with _no_collection(), _own_handlers(), _none_left():
                results = _Agent(spec, Path(folder)).run().return_values
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + stopped.sigval) from None
        finally:
            spec.rdzv_handler.shutdown()
    return [results[rank] for rank in range(ranks)]


def killed() -> str:
    """Why the ranks before this one were stopped, in a rank that was forked in their place; empty elsewhere."""
    return os.environ.get(_KILLED, "")


def forked() -> bool:
    """Whether this process is a rank that Helix forked, which differs from the others in nothing."""
    return _KILLED in os.environ


def _rank_main(fn: Callable[..., T], args: tuple[Any, ...], device: str, timeout_s: float, this: _Round) -> T:
    rank = int(os.environ["RANK"])
    gc.freeze()  # see _no_collection
    gc.enable()
    # The launcher's Python handlers came along with the fork. A rank that waits inside a collective runs no
    # Python, so it would outlive SIGTERM until elastic's SIGKILL, 30 s later.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _die_with(this.parent)
    activity.record_to(this.folder / f"{rank}.activity")
    os.environ[_KILLED] = this.killed
    # A rank that connects has the launcher's store thread look up its address, under a lock of the C library. A
    # rank forked at that moment would inherit the lock, held for ever; so none connects before the last is forked.
    if int(os.environ["LOCAL_RANK"]) == int(os.environ["LOCAL_WORLD_SIZE"]) - 1:
        this.all_forked.set()
    this.all_forked.wait()
    try:
        with ProcessGroup(device, timeout_s):
            return fn(*args)
    except Exception as error:
        cause = raised(rank, activity.current(), error, traceback.format_exc())
        try:
            _keep(error, cause, this.folder / f"{rank}.pickle")
        except OSError:  # no room, or no file more; the launcher then knows only that this rank has ended
            print(cause.trace, file=sys.stderr)
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


@contextmanager
def _none_left() -> Iterator[None]:
    """Kill what is left of the ranks: elastic does not know of those that a signal to it kept it from counting."""
    before = set(active_children())
    try:
        yield
    finally:
        for process in set(active_children()) - before:
            process.kill()
            process.join()


def _die_with(parent: int) -> None:
    """Have the kernel kill this rank when its launcher dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _keep(error: Exception, cause: RankError, path: Path) -> None:
    """Put the error where the launcher finds it, and where it was; one that does not pickle as its text."""
    note = f"on rank {cause.rank}:\n{cause.trace}"
    try:
        error.add_note(note)
        content = pickle.dumps((error, cause))
        pickle.loads(content)
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(note)
        content = pickle.dumps((plain, cause))
    draft = path.with_suffix(".draft")
    draft.write_bytes(content)
    draft.rename(path)  # this rank may be stopped at any time


def _first_raised(folder: Path) -> tuple[BaseException, RankError]:
    """The error that was raised first, and where; later ones are of connections that broke because of it."""
    first = min(folder.glob("*.pickle"), key=lambda path: path.stat().st_mtime_ns)
    error, cause = pickle.loads(first.read_bytes())
    return error, cause
