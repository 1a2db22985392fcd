"""Where ranks are, and whether they wait for each other in a circle. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from helix.flight.parting import place_in_words


@dataclass(frozen=True)
class Spot:
    """Where a rank is, as it says before it waits.

    Args:
        host, phase: where it runs, and what it was doing (`helix.flight.activity`).
        course, number: of the last collective or transfer that it came to; 0 before the first.
        axis, ranks, what: of that, for people.
        meets: whether all of its ranks wait for each other there, as those of a transfer do not.
        rows: that it sends to and receives from each rank, of an all-to-all whose shares differ.
        end: how its work has ended, if it has.
    """

    rank: int
    host: str
    phase: str = "start"
    course: str = ""
    number: int = 0
    axis: str = ""
    ranks: tuple[int, ...] = ()
    what: str = ""
    meets: bool = False
    rows: tuple[list[int], list[int]] | None = None
    end: str = ""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Spot:
        """From JSON, which has no tuples."""
        return cls(**{**found, "ranks": tuple(found["ranks"])})

    @property
    def place(self) -> str:
        return f"{place_in_words(self.number, self.axis, self.ranks)}, {self.what}"


def circle(spots: Mapping[int, Spot], rank: int, waits: Callable[[Spot], bool]) -> list[int]:
    """Ranks of which each waits for the next, and the last for the first, if `rank` waits for any of them; else none.

    Sound although ranks go on meanwhile: where each was is known before it is asked whether it still waits there. At
    the moment between, all of them waited, and none had come to where the one before it was.

    Args:
        spots: where ranks were.
        waits: whether one still waits there now.
    """
    waiting = {each: waits(spot) for each, spot in spots.items()}
    path: list[int] = []
    done: set[int] = set()

    def follow(each: int) -> list[int]:
        if each in path:
            return path[path.index(each) :]
        if each in done or not waiting.get(each):
            return []
        path.append(each)
        spot = spots[each]
        for other in spot.ranks:
            there = spots.get(other)
            elsewhere = there is not None and (there.course, there.number) != (spot.course, spot.number)
            if elsewhere and (found := follow(other)):
                return found
        path.pop()
        done.add(each)
        return []

    return follow(rank)
