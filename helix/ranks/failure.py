"""What ended a rank, in one sentence that names the rank, its host and what it was doing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from helix.config.environment import tell_launcher

# Where a run's folder is of a network that was cut off, who writes to it may never come back.
_KEEP_S = 8.0
_TEXT = 1 << 14  # characters of an error's words, and of its trace, that other ranks are told


class RankError(RuntimeError):
    """A rank that was lost, or whose error ended the others.

    Args:
        rank: which one; host: where it ran.
        phase: what it was doing; see `helix.flight.activity`.
        what: what happened to it, as in "was killed by SIGKILL".
        detail: more about it, after the phase; empty for none.
        trace: its traceback, if it raised.
    """

    def __init__(self, rank: int, host: str, phase: str, what: str, detail: str = "", trace: str = "") -> None:
        super().__init__(rank, host, phase, what, detail, trace)  # what pickle gives back
        self.rank, self.host, self.phase, self.what, self.detail, self.trace = rank, host, phase, what, detail, trace

    def short(self) -> tuple[int | str, ...]:
        """What makes it again elsewhere, of a bounded length."""
        *others, detail, trace = self.args
        return *others, detail[:_TEXT], trace[-_TEXT:]

    def __str__(self) -> str:
        more = f": {self.detail}" if self.detail else ""
        who = f"rank {self.rank} (host {self.host})"
        return f"{who} {self.what} during {self.phase}{more}; the other ranks were stopped"


@dataclass(frozen=True)
class Memory:
    """How often the kernel has killed a process of this host for want of memory, when this was made."""

    kills: int | None = field(default_factory=lambda: _kills())

    def blamed(self) -> str:
        """What to say of a rank that SIGKILL ended since then."""
        now = _kills()
        if self.kills is None or now is None:
            return ""
        return "the kernel killed a process for want of memory at that time" if now > self.kills else ""


def _kills() -> int | None:
    """Of this host, all control groups included; the counter is there since Linux 4.13, and readable by anyone."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


_told: list[Callable[[RankError], object]] = []
_settled: list[Callable[[], object]] = []


@contextmanager
def told(keep: Callable[[RankError], object]) -> Iterator[None]:
    """While inside, `keep` is called if a lost rank ends this process before anything could be raised in it."""
    _told.append(keep)
    try:
        yield
    finally:
        _told.remove(keep)


@contextmanager
def settled(settle: Callable[[], object]) -> Iterator[None]:
    """While inside, `settle` is called when this process is told to stop, and may end it with what is behind that."""
    _settled.append(settle)
    try:
        yield
    finally:
        _settled.remove(settle)


def stop() -> None:
    """To be called when this process was told to stop; returns if no lost rank is behind that."""
    for settle in _settled:
        settle()


def tell(error: RankError, speaks: bool) -> None:
    """Say on stderr, if this rank `speaks`, why this process is about to end, and have what can be kept be kept.

    The flight record by every rank, and what was asked for with `told` by the one that speaks, the first one first.
    """
    tell_launcher(str(error))
    if speaks:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
    keeping = threading.Thread(target=_keep, args=(error, _told if speaks else []), daemon=True)
    keeping.start()
    keeping.join(_KEEP_S)


def _keep(error: RankError, told: Sequence[Callable[[RankError], object]]) -> None:
    from helix.flight import ring  # brings torch, which a rank has and who reads its report need not

    for keep in (lambda error: ring.write(reason=str(error)), *told):
        with suppress(Exception):  # the others' share, and the end itself, do not depend on it
            keep(error)


def ended(rank: int, phase: str, exit_code: int, memory: Memory) -> RankError:
    """A rank of this host that ended without raising."""
    host = socket.gethostname()
    if exit_code >= 0:
        return RankError(rank, host, phase, f"ended with exit code {exit_code}")
    blamed = memory.blamed() if exit_code == -signal.SIGKILL else ""
    names = {each.value: each.name for each in signal.Signals}  # real-time signals have none
    return RankError(rank, host, phase, f"was killed by {names.get(-exit_code, f'signal {-exit_code}')}", blamed)


def raised(rank: int, phase: str, error: BaseException, trace: str) -> RankError:
    """A rank of this host that raised."""
    words = " ".join(str(error).split())
    what = "ran out of memory" if exhausted(error) else f"raised {type(error).__name__}"
    return RankError(rank, socket.gethostname(), phase, what, words, trace)


def exhausted(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of the host or of a device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    import torch  # who reads what failed jobs have left needs none of it

    # Torch has no class for the CPU's.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and os.strerror(errno.ENOMEM) in str(error)
    )


def end_agent() -> None:
    """End the torchrun of a host that has lost rank 0's, where the store is that it would wait for.

    It would until the kernel gives up the connection, a quarter of an hour by Linux's defaults, deaf to SIGTERM. With
    restarts left it is spared: the network may be back in time.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    with suppress(psutil.Error):
        agent = psutil.Process().parent()
        if (
            left <= 0
            and agent
            and any(word.endswith(("torchrun", "torch.distributed.run")) for word in agent.cmdline())
        ):
            agent.kill()
