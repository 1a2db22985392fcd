"""The flight record: what this rank's last collectives were, always kept, and written when a job fails.

    last()                   "all_to_all/attention.qkv [4, 64, 96] float32, collective 117 of the slice axis .."
    write(folder)            folder/flight/rank-3.json, which `python -m helix flight FOLDER` compares

It holds Helix's own collectives and transfers, and in debug mode other libraries' (`helix.comm.foreign`).
Collectives are numbered within the ranks that take part, not within a process group: ranks that are in two groups
together have to come to both in one order as well. An entry costs 2 us (paper/LOG.md, 2026-11-22), which is why it is
always on; PyTorch's own recorder knows NCCL alone, and none of what goes through shared memory.
"""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from helix.flight.activity import current
from helix.flight.parting import place_in_words, tensor_in_words
from helix.flight.reading import FOLDER

ENTRIES = 1000  # of the ring; a step of 16 layers with its backward is a few hundred


class Course:
    """What one set of ranks does together, in its order.

    Args:
        ranks: global ranks; of transfers (source, destination).
        name: the same on all of them, and no other course's.
    """

    def __init__(self, ranks: tuple[int, ...], name: str) -> None:
        self.ranks, self.name, self.count = ranks, name, 0


@dataclass(slots=True, eq=False)
class Entry:
    """One collective as this rank came to it.

    Args:
        course: whose number it has.
        number: from 1.
        key: "collective/name".
        axis: the mesh axis' name, or the library's group.
        shape: of what the rank puts in; None where that says nothing.
        nbytes: that leave the rank.
        phase: that the rank was in (`helix.flight.activity`).
        came: seconds of the monotonic clock.
        ended: as `came`; None while it is under way, or where that is not known.
        enqueued: as `came`, if a CUDA stream or another library then took it over: nobody here knows when it ends.
    """

    course: Course
    number: int
    key: str
    axis: str
    shape: Sequence[int] | None
    dtype: torch.dtype | None
    nbytes: int
    phase: str
    came: float
    ended: float | None = None
    enqueued: float | None = None

    def end(self, device: torch.device) -> None:
        """The rank goes on; on CUDA only its stream knows whether the collective is over."""
        if device.type == "cuda":
            self.enqueue()
        else:
            self.ended = time.monotonic()

    def enqueue(self) -> None:
        self.enqueued = time.monotonic()

    @property
    def type(self) -> str:
        return str(self.dtype).removeprefix("torch.") if self.dtype else ""

    @property
    def what(self) -> str:
        return tensor_in_words(self.key, self.shape, self.type)

    @property
    def place(self) -> str:
        return place_in_words(self.number, self.axis, self.course.ranks)


_ring: deque[Entry] = deque(maxlen=ENTRIES)
_by_name: dict[str, Course] = {}
_of_group: WeakKeyDictionary[dist.ProcessGroup, Course] = WeakKeyDictionary()
_home: list[ref[dist.ProcessGroup]] = []
_folder: list[Path] = []


def come(
    key: str,
    axis: str,
    group: dist.ProcessGroup | None,
    nbytes: int,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> Entry:
    """Note that this rank has come to a collective; its `end` notes that it is over."""
    course = None if group is None else _of_group.get(group)
    return _note(course or _course(group), key, axis, nbytes, shape, dtype)


def come_to_transfer(
    key: str, axis: str, source: int, destination: int, nbytes: int, shape: Sequence[int], dtype: torch.dtype
) -> Entry:
    """As `come`, of what one rank sends another; each pair and direction has its own count."""
    _forget_earlier_ranks()
    name = f"{source}>{destination}"
    course = _by_name.get(name) or _by_name.setdefault(name, Course((source, destination), name))
    return _note(course, key, axis, nbytes, shape, dtype)


def last() -> str:
    """This rank's last collective in words, and for how long it has been in it; empty before the first."""
    try:
        entry = _ring[-1]
    except IndexError:  # asked before by another thread, it may be empty a moment later
        return ""
    ended, enqueued, now = entry.ended, entry.enqueued, time.monotonic()
    since = f"for {now - entry.came:.1f} s"
    if ended is not None:
        since = f"left {now - ended:.1f} s ago"
    elif enqueued is not None:
        since = f"enqueued {now - enqueued:.1f} s ago"
    return f"{entry.what}, {entry.place}, {since}"


def keep_in(folder: Path | None) -> None:
    """Where `write` puts the record if it is not told: the folder of the run that has begun, or None."""
    _folder[:] = [] if folder is None else [folder]


def kept_in() -> Path | None:
    """As `keep_in` was told: on ranks of a launcher rank 0's folder, whichever their own is."""
    return _folder[0] if _folder else None


def remove(folder: Path) -> None:
    """Remove the records of an earlier start, which are not to be compared with those of a later one."""
    for path in (folder / FOLDER).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def write(folder: Path | None = None, reason: str = "") -> Path | None:
    """Write this rank's record as JSON; None if there is no folder for it, or it cannot be written.

    Args:
        folder: of the run; None for that of `keep_in`.
        reason: why it is written.
    """
    folder = folder or kept_in()
    if folder is None:
        return None
    record = as_dict(reason)
    path = folder / FOLDER / f"rank-{record['rank']}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n")
    except OSError:  # on the way out of a failure, which it must not replace
        return None
    return path


def as_dict(reason: str = "") -> dict[str, Any]:
    offset = time.time() - time.monotonic()
    return {
        "rank": dist.get_rank(),
        "ranks": dist.get_world_size(),
        "host": socket.gethostname(),
        "phase": current(),
        "reason": reason,
        "written_at": time.time(),
        "entries": [_as_dict(entry, offset) for entry in list(_ring)],
    }


def _as_dict(entry: Entry, offset: float) -> dict[str, Any]:
    return {
        "course": entry.course.name,
        "ranks": entry.course.ranks,
        "axis": entry.axis,
        "number": entry.number,
        "key": entry.key,
        "shape": None if entry.shape is None else list(entry.shape),
        "dtype": entry.type,
        "bytes": entry.nbytes,
        "phase": entry.phase,
        "came_at": entry.came + offset,
        "ended_at": None if entry.ended is None else entry.ended + offset,
        "enqueued_at": None if entry.enqueued is None else entry.enqueued + offset,
    }


def _note(
    course: Course, key: str, axis: str, nbytes: int, shape: Sequence[int] | None, dtype: torch.dtype | None
) -> Entry:
    course.count += 1
    entry = Entry(course, course.count, key, axis, shape, dtype, nbytes, current(), time.monotonic())
    _ring.append(entry)
    return entry


def _course(group: dist.ProcessGroup | None) -> Course:
    """A group's, when it first does something."""
    _forget_earlier_ranks()
    whole = group or dist.group.WORLD
    assert whole is not None
    ranks = tuple(dist.get_process_group_ranks(whole))
    name = ",".join(map(str, ranks))
    course = _of_group[whole] = _by_name.get(name) or _by_name.setdefault(name, Course(ranks, name))
    return course


def begin_anew() -> None:
    """Number collectives from 1 again, as ranks do together that may have come to different ones before."""
    _by_name.clear()
    _of_group.clear()
    _ring.clear()


def _forget_earlier_ranks() -> None:
    """Processes of torchrun have one process group after another; counts and record are of the present one."""
    whole = dist.group.WORLD
    assert whole is not None
    if not _home or _home[0]() is not whole:
        _home[:] = [ref(whole)]
        begin_anew()
