"""What an executable check of a claim returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a claim states, what follows from the papers' other words, and whether both agree.

    Args:
        states, follows: figures in one unit.
        agrees: whether the claim can stand.
        words: the arithmetic, on one line.
    """

    states: float
    follows: float
    agrees: bool
    words: str
