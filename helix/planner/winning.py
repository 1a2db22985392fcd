"""Where slicing features wins: the best layout with m > 1 against the best of all others, over devices and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from helix.planner.candidates import Asked
from helix.planner.estimate import Estimator
from helix.planner.search import GOALS, search
from helix.planner.work import Estimate

DEVICES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
BATCHES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Cell:
    """One number of devices and one batch.

    Args:
        sliced: the best layout with m > 1; rival: the best of all others. None where none fits.
        goal: what both are the best in.
    """

    devices: int
    batch: int
    sliced: Estimate | None
    rival: Estimate | None
    goal: str

    @property
    def ratio(self) -> float | None:
        """How many times as good as its rival the sliced layout is; None where either does not exist."""
        if self.sliced is None or self.rival is None:
            return None
        own, theirs = GOALS[self.goal](self.sliced), GOALS[self.goal](self.rival)
        return own / theirs if self.goal == "throughput" else theirs / own


def cells(
    estimator: Estimator,
    goal: str,
    asked: Asked,
    devices: Sequence[int] = DEVICES,
    batches: Sequence[int] = BATCHES,
) -> list[Cell]:
    """Every combination, with the estimator's model, machine and work otherwise."""
    out = []
    for count in devices:
        for batch in batches:
            machine = replace(estimator.machine, devices=count)
            one = Estimator(estimator.shape, machine, replace(estimator.work, batch=batch))
            found = search(one, goal, asked).fitting
            sliced = next((each for each in found if each.layout.m > 1), None)
            rival = next((each for each in found if each.layout.m == 1), None)
            out.append(Cell(count, batch, sliced, rival, goal))
    return out
