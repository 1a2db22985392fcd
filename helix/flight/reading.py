"""The flight records of a run's ranks, read and compared: where they part. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix.config.schema import ConfigError
from helix.flight.parting import parted, place_in_words, ranks_in_words, tensor_in_words

FOLDER = "flight"  # of a run's folder


@dataclass(frozen=True)
class Noted:
    """One collective or transfer of one rank, as `helix.flight.ring.Entry` has it; times in seconds of the epoch."""

    course: str
    ranks: tuple[int, ...]
    axis: str
    number: int
    key: str
    what: str
    phase: str
    came_at: float
    ended_at: float | None
    enqueued_at: float | None

    @property
    def state(self) -> str:
        if self.ended_at is not None:
            return "left"
        return "was in" if self.enqueued_at is None else "enqueued"

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
    inner = folder / FOLDER
    paths = sorted((inner if inner.is_dir() else folder).glob("rank-*.json"))
    if not paths:
        raise ConfigError(
            f"{folder} holds no flight record ({FOLDER}/rank-*.json), which ranks write when a run fails"
        )
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
    ended, enqueued = found["ended_at"], found["enqueued_at"]
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
        enqueued_at=None if enqueued is None else float(enqueued),
    )


def verdict(records: Sequence[Record]) -> str:
    """In a sentence, where the ranks part, who did not come, or that neither shows."""
    said = _parting(records) or _absence(records) or _lag(records)
    absent = sorted(set(range(records[0].ranks)) - {record.rank for record in records})
    if not said and any(entry.state == "enqueued" for record in records for entry in record.entries):
        said = (
            "no rank came to another collective than the others; whether what was enqueued has ended, no record says"
        )
    elif not said:
        said = "the records agree: no rank came to another collective than the others, and none is waited for"
    return f"{said}; {ranks_in_words(absent)} left no record" if absent else said


def _parting(records: Sequence[Record]) -> str:
    """A collective to which ranks came with different tensors, and none of them to such a one before.

    By each rank's own order: the clocks of several hosts differ.
    """
    found: dict[tuple[str, int], str] = {}
    for place, here in _by_place(records).items():
        # A transfer's two sides, and an all-to-all's uneven shares, differ rightly in what one entry shows.
        came = {rank: _comparable(entry) for rank, entry in here.items() if ">" not in entry.course}
        if len(set(came.values())) > 1:
            first = next(iter(here.values()))
            found[place] = parted(first.place, came)[1]
    before = dict.fromkeys(found, 0)
    for record in records:
        order = dict.fromkeys(key for entry in record.entries if (key := (entry.course, entry.number)) in found)
        for earlier, key in enumerate(order):
            before[key] += earlier
    return found[min(found, key=lambda key: (before[key], key))] if found else ""


def _absence(records: Sequence[Record]) -> str:
    """A collective that ranks wait in, for some that wait for nobody if there is such a one, and where those are.

    Of a rank without a record nobody knows to what it has come.
    """
    known = {record.rank for record in records}
    last = {record.rank: record.entries[-1] for record in records if record.entries}
    missing = {
        rank: [other for other in entry.ranks if other in known and not _came(records, other, entry)]
        for rank, entry in last.items()
        if entry.state == "was in"
    }
    waiting = sorted(rank for rank, others in missing.items() if others)
    if not waiting:
        unsure = [rank for rank in missing if not known.issuperset(last[rank].ranks)]
        said = [f"{ranks_in_words([rank])} waited in {last[rank].place}, {last[rank].what}" for rank in unsure[:4]]
        return "; ".join(said)
    rank = min(waiting, key=lambda rank: sum(other in waiting for other in missing[rank]))
    entry = last[rank]
    here = ranks_in_words(each for each in entry.ranks if each in known and each not in missing[rank])
    said = [f"{here} waited in {entry.place}, {entry.what}, to which {ranks_in_words(missing[rank])} had not come"]
    said += [f"rank {each} {last[each].state} {last[each].place}, {last[each].what}"
             for each in missing[rank] if each in last]  # fmt: skip
    return "; ".join(said)


def _lag(records: Sequence[Record]) -> str:
    """The collective that the fewest came to of those that ranks enqueued, which others may be stuck behind."""
    most: dict[str, dict[int, Noted]] = {}
    for record in records:
        for entry in record.entries:
            most.setdefault(entry.course, {})[record.rank] = entry
    known = [record.rank for record in records]
    for here in most.values():
        first = max(here.values(), key=lambda entry: entry.number)
        came = {rank: here[rank].number if rank in here else 0 for rank in first.ranks if rank in known}
        if first.state == "enqueued" and len(set(came.values())) > 1:
            behind = [rank for rank, number in came.items() if number < first.number]
            numbers = " and ".join(str(came[rank]) for rank in behind)
            return (
                f"{ranks_in_words(rank for rank in came if rank not in behind)} enqueued {first.place}, {first.what}, "
                f"and {ranks_in_words(behind)} no more than {numbers} there; which of them ended, no record says"
            )
    return ""


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
