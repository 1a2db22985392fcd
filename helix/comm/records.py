"""The flight records of a run's ranks, read and compared: where they part. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix.comm.parting import parted, place_in_words, ranks_in_words, tensor_in_words
from helix.config.schema import ConfigError


@dataclass(frozen=True)
class Noted:
    """One collective or transfer of one rank, as `helix.comm.flight.Entry` has it; times in seconds of the epoch."""

    course: str
    ranks: tuple[int, ...]
    axis: str
    number: int
    key: str
    what: str
    phase: str
    came_at: float
    ended_at: float | None

    @property
    def place(self) -> str:
        return place_in_words(self.number, self.axis, self.ranks)


@dataclass(frozen=True)
class Record:
    """What one rank wrote.

    Args:
        ranks: of the job.
        phase: that it was in when it wrote.
        reason: why it did.
        entries: its last collectives, in its order.
    """

    rank: int
    ranks: int
    host: str
    phase: str
    reason: str
    entries: tuple[Noted, ...]


def read(folder: Path) -> list[Record]:
    """The records of a run's folder, by rank.

    Raises:
        ConfigError: if there are none, or one is none.
    """
    inner = folder / "flight"
    paths = sorted((inner if inner.is_dir() else folder).glob("rank-*.json"))
    if not paths:
        raise ConfigError(f"{folder} holds no flight record (flight/rank-*.json), which ranks write when a run fails")
    return sorted((_read(path) for path in paths), key=lambda record: record.rank)


def _read(path: Path) -> Record:
    try:
        found = json.loads(path.read_text())
        entries = tuple(_noted(each) for each in found["entries"])
        host, phase, reason = (str(found[name]) for name in ("host", "phase", "reason"))
        return Record(int(found["rank"]), int(found["ranks"]), host, phase, reason, entries)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no flight record: {type(error).__name__}: {error}") from error


def _noted(found: Mapping[str, Any]) -> Noted:
    what = tensor_in_words(found["key"], found["shape"], found["dtype"])
    ended = found["ended_at"]
    return Noted(
        course=str(found["course"]),
        ranks=tuple(int(rank) for rank in found["ranks"]),
        axis=str(found["axis"]),
        number=int(found["number"]),
        key=str(found["key"]),
        what=what,
        phase=str(found["phase"]),
        came_at=float(found["came_at"]),
        ended_at=None if ended is None else float(ended),
    )


def verdict(records: Sequence[Record]) -> str:
    """In a sentence, where the ranks part, who did not come, or that neither shows."""
    said = _parting(records) or _absence(records)
    absent = sorted(set(range(records[0].ranks)) - {record.rank for record in records})
    if not said:
        said = "the records agree: no rank came to another collective than the others, and none is waited for"
    return f"{said}; {ranks_in_words(absent)} left no record" if absent else said


def _parting(records: Sequence[Record]) -> str:
    """The first collective, by the clock, to which ranks came with different tensors."""
    found: list[tuple[float, str]] = []
    for here in _by_place(records).values():
        # A transfer's two sides, and an all-to-all's uneven shares, differ rightly in what one entry shows.
        came = {rank: _comparable(entry) for rank, entry in here.items() if ">" not in entry.course}
        if len(set(came.values())) > 1:
            first = next(iter(here.values()))
            found.append((min(entry.came_at for entry in here.values()), parted(first.place, came)[1]))
    return min(found)[1] if found else ""


def _absence(records: Sequence[Record]) -> str:
    """The collective that ranks wait in longest, and where those are that have not come to it."""
    last = {record.rank: record.entries[-1] for record in records if record.entries}
    waiting = [
        (entry.came_at, rank, entry)
        for rank, entry in last.items()
        if entry.ended_at is None and any(not _came(records, other, entry) for other in entry.ranks)
    ]
    if not waiting:
        return ""
    entry = min(waiting)[2]
    missing = [rank for rank in entry.ranks if not _came(records, rank, entry)]
    here = ranks_in_words(rank for rank in entry.ranks if rank not in missing)
    said = [f"{here} waited in {entry.place}, {entry.what}, to which {ranks_in_words(missing)} had not come"]
    for rank in missing:
        if rank in last:
            state = "left" if last[rank].ended_at else "was in"
            said.append(f"rank {rank} {state} {last[rank].place}, {last[rank].what}")
    return "; ".join(said)


def _came(records: Iterable[Record], rank: int, entry: Noted) -> bool:
    numbers = [
        each.number
        for record in records
        if record.rank == rank
        for each in record.entries
        if each.course == entry.course
    ]
    return bool(numbers) and max(numbers) >= entry.number


def _by_place(records: Sequence[Record]) -> dict[tuple[str, int], dict[int, Noted]]:
    found: dict[tuple[str, int], dict[int, Noted]] = {}
    for record in records:
        for entry in record.entries:
            found.setdefault((entry.course, entry.number), {})[record.rank] = entry
    return found


def _comparable(entry: Noted) -> str:
    if not entry.key.startswith("all_to_all/") or "[" not in entry.what:
        return entry.what
    head, _, rest = entry.what.partition("[")
    shape, _, dtype = rest.partition("]")
    return f"{head}[{', '.join(['*', *shape.split(', ')[1:]])}]{dtype}"
