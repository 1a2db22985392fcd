"""One step's time on every rank in three parts: computing, moving bytes, and waiting for other ranks.

A collective can move its bytes once its last rank has come to it. A rank that came earlier waited until then:

    rank 0   compute . . . [ wait ][ transfer ] compute
    rank 1   compute . . . . . . . [ transfer ] compute
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from helix.comm.record import Span


@dataclass(frozen=True)
class Step:
    """One rank's step, times in seconds of its machine's monotonic clock.

    Args:
        start_s, end_s: of the step.
        spans: its collectives, `helix.comm.record.Log.spans`.
        host: the machine's name.
    """

    start_s: float
    end_s: float
    spans: Sequence[Span]
    host: str


@dataclass(frozen=True)
class Parts:
    """Seconds of one rank's step, or their mean over the ranks; they add up to the step."""

    compute_s: float
    transfer_s: float
    wait_s: float


@dataclass(frozen=True)
class Split:
    """The parts of a step on every rank, by rank."""

    ranks: tuple[Parts, ...]

    @property
    def mean(self) -> Parts:
        count = len(self.ranks)
        return Parts(
            sum(parts.compute_s for parts in self.ranks) / count,
            sum(parts.transfer_s for parts in self.ranks) / count,
            sum(parts.wait_s for parts in self.ranks) / count,
        )


# A collective of several ranks: its name, its ranks, and how many of these came before it.
_Meeting = tuple[str, tuple[int, ...], int]


def split(steps: Sequence[Step]) -> Split | None:
    """Split the same step of all ranks.

    The n-th call of one name by the same ranks is taken to be one collective, the n-th send from a to b to meet
    b's n-th receive from a. What a rank does while a transfer runs in the background is computing.

    Args:
        steps: by rank.

    Returns:
        None if the ranks are on several machines, whose clocks cannot be compared.
    """
    if len({step.host for step in steps}) > 1:
        return None
    met = [_meetings(step.spans) for step in steps]
    last: dict[_Meeting, float] = {}
    for meetings in met:
        for meeting, span in meetings.items():
            last[meeting] = max(last.get(meeting, span.start_s), span.start_s)
    return Split(tuple(_parts(step, meetings, last) for step, meetings in zip(steps, met, strict=True)))


def _meetings(spans: Sequence[Span]) -> dict[_Meeting, Span]:
    """One rank's spans by the collective that they are its part of."""
    count: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    out = {}
    for span in spans:
        collective, _, axis = span.key.partition("/")
        key = f"transfer/{axis}" if collective in ("send", "recv") else span.key
        out[key, span.ranks, count[key, span.ranks]] = span
        count[key, span.ranks] += 1
    return out


def _parts(step: Step, meetings: dict[_Meeting, Span], last: dict[_Meeting, float]) -> Parts:
    transfer = wait = 0.0
    free = step.start_s  # no second of the step counts twice
    for meeting, span in sorted(meetings.items(), key=lambda item: item[1].blocked_s):
        start, end = max(span.blocked_s, free), min(span.end_s, step.end_s)
        if end <= start:
            continue
        complete = min(max(last[meeting], start), end)
        wait += complete - start
        transfer += end - complete
        free = end
    return Parts(max(0.0, step.end_s - step.start_s - transfer - wait), transfer, wait)
