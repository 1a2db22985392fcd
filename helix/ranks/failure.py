"""What ended a rank, in one sentence that names the rank, its host and what it was doing."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

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
_stopping = False


@contextmanager
def told(keep: Callable[[RankError], object]) -> Iterator[None]:
    """While inside, `keep` is called if a lost rank ends this process before anything could be raised in it."""
    _told.append(keep)
    try:
        yield
    finally:
        _told.remove(keep)


def stop() -> None:
    """Note that this process was told to stop: that others end as well is then no fault of theirs."""
    global _stopping
    _stopping = True


def stopping() -> bool:
    return _stopping


def tell(error: RankError) -> None:
    """Have those who asked for it, the first one first, keep what can be kept; this process is about to end."""
    for keep in _told:
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
