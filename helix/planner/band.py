"""How far off modelled times may be, in words.

A hardware file's `time_error_share` is what `python -m helix validate` measured: forward passes of two-layer models.
Of training and generation on it nobody knows.
"""

from __future__ import annotations

from helix.planner import published

MEASURED = "forward passes of 2-layer models on 2 to 16 ranks (python -m helix validate)"
_OTHER = {"train": "training", "generate": "generation"}


def band(error: float | None, mode: str) -> str:
    """In a sentence or two.

    Args:
        error: the hardware file's `time_error_share`.
    """
    if error is None:
        medians = sorted(table.median_error for table in published.tables())
        return (
            "Times are modelled, and nobody has held this hardware's file against measurements: their error is "
            "unknown. Against published tables of training on A100s, to which nothing was fitted, it is "
            f"{medians[0]:.0%} to {medians[-1]:.0%} at the median (python -m helix plan --published)."
        )
    if mode in _OTHER:
        return (
            f"Times are modelled, and their error in {_OTHER[mode]} is unknown: on this hardware the median error of "
            f"{MEASURED} was {error:.0%}."
        )
    return f"Times are modelled; on this hardware the median error of {MEASURED} was {error:.0%}."


def few_words(error: float | None, mode: str) -> str:
    """For a place in a line."""
    if error is None:
        return "error unknown"
    return f"error unknown, of forward passes {error:.0%}" if mode in _OTHER else f"median error {error:.0%}"
