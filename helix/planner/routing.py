"""How unevenly tokens fall on experts, where nobody has measured it."""

from __future__ import annotations

import math


def expected_fullest(rows: float, experts: int) -> float:
    """Rows of the fullest of `experts` when `rows` fall on them at random.

    Mean plus the Gaussian estimate of the greatest of `experts` deviations, sqrt(2 mean ln experts); never more than
    all rows. A trained router's balance is the model's own affair: this is the floor that chance sets.
    """
    if experts <= 1:
        return rows
    mean = rows / experts
    return min(rows, mean + math.sqrt(2 * mean * math.log(experts)))


def expected_touched(rows: float, experts: int) -> float:
    """How many of `experts` get any of `rows` that fall on them at random."""
    return experts * (1 - (1 - 1 / experts) ** rows) if experts > 1 else float(min(experts, 1))
