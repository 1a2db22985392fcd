"""Fields that say which values they take, for `helix.config.check` to read."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from omegaconf import MISSING

# Metadata of lists that are a measured curve: where its points are (above 0, ascending), and a figure of each.
PLACES = {"curve": "places"}
FIGURES = {"curve": "figures"}


def one_of(default: str | None, choices: tuple[str, ...]) -> Any:
    """A field that holds one of a few words."""
    return field(default=default, metadata={"choices": choices})


def at_least(bound: int, default: Any = MISSING) -> Any:
    """A numeric field with a lower bound (inclusive); null, where its type allows that, is not held against it."""
    return field(default=default, metadata={"at_least": bound})


def bounded(default: Any = MISSING, **bounds: float) -> Any:
    """A numeric field with any of the bounds `at_least`, `above`, `at_most` and `below`."""
    assert bounds.keys() <= {"at_least", "above", "at_most", "below"}, bounds
    return field(default=default, metadata=bounds)
