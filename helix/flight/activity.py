"""What this rank is doing: the phase that a message names when the rank is lost.

A rank that is killed can say nothing, so it says beforehand where it is: in a file that its launcher reads when it is
gone, and in what `helix.ranks.heartbeat` tells the other ranks. Phases are coarse ("load", "measurement, run 2 of 5"):
a few for each run, none for a step, and entering one takes 10 us.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START = "start"
# The phase of this process, and the file that says it to others. Both are the process's, as a forked rank's are.
_phase = START
_record: Path | None = None
_heard: Callable[[], None] | None = None


def current() -> str:
    """The phase that this rank is in."""
    return _phase


def enter(phase: str) -> None:
    """Be in a phase from now on."""
    global _phase
    if phase != _phase:
        _phase = phase
        _write()
        if _heard is not None:
            _heard()


@contextmanager
def activity(phase: str) -> Iterator[None]:
    """Be in a phase while inside. An error leaves it as it is, so that whoever reports the error can name it."""
    before = current()
    enter(phase)
    yield
    enter(before)


def record_to(path: Path) -> None:
    """Say each phase of this process in a file from now on, beginning with "start"."""
    global _phase, _record
    _phase, _record = START, path
    _write()


def folder() -> str | None:
    """A folder for this rank's temporary files; None without a record.

    That of forked ranks is one for all of them, and their launcher removes it, however they have ended. Under torchrun
    it is the rank's within torchrun's log folder, which torchrun leaves.
    """
    return None if _record is None else str(_record.parent)


def listen(heard: Callable[[], None] | None) -> None:
    """Have something called at each new phase; None for nothing."""
    global _heard
    _heard = heard


def read(path: Path) -> tuple[int, str]:
    """The process and the phase that a record says; (0, "start") if it says none yet."""
    try:
        pid, phase = path.read_text().split(maxsplit=1)
        return int(pid), phase
    except (OSError, ValueError):
        return 0, START


def _write() -> None:
    if _record is None:
        return
    # Renamed into place: one that is read, or whose rank is killed, is never half a line. A full disk is no reason to
    # end a rank.
    with suppress(OSError):
        draft = _record.with_suffix(".draft")
        draft.write_text(f"{os.getpid()} {_phase}")
        draft.rename(_record)
