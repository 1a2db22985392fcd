"""How unevenly tokens fall on experts, where nobody has measured it."""

from __future__ import annotations

import math

# Part of all bytes that are spaces, in the text that infer.py and train.py read where they are given no other: this
# machine's Python standard library. Taken for any text of theirs, whose bytes nobody counts before a run.
COMMONEST_BYTE = 0.29


def expected_fullest(rows: float, experts: int, commonest: float = 0.0) -> float:
    """Rows of the fullest of `experts` when `rows` fall on them at random.

    Tokens that are alike go to the same expert: the commonest token's all go together (`commonest`, their part of
    all), beside that expert's share of the others. Of these: mean plus the Gaussian estimate of the greatest of
    `experts` deviations, sqrt(2 mean ln experts); never more than all rows. A trained router's balance is the model's
    own affair: this is the floor that chance sets.
    """
    if experts <= 1:
        return rows
    together = rows * commonest
    mean = (rows - together) / experts
    return min(rows, together + mean + math.sqrt(2 * mean * math.log(experts)))


def expected_touched(rows: float, experts: int) -> float:
    """How many of `experts` get any of `rows` that fall on them at random."""
    return experts * (1 - (1 - 1 / experts) ** rows) if experts > 1 else float(min(experts, 1))
