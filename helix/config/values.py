"""Checks of single values against what the schema states beside its fields (`helix.config.bounds`)."""

from __future__ import annotations

import operator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from helix.config.schema import ConfigError

_BOUNDS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def check_values(node: Any, prefix: str = "") -> None:
    """Check every field against the choices and bounds that its schema states beside it."""
    for spec in fields(node):
        key, value = prefix + spec.name, getattr(node, spec.name)
        if is_dataclass(value):
            check_values(value, key + ".")
        elif value is None:
            continue
        elif "choices" in spec.metadata and value not in spec.metadata["choices"]:
            legal = spec.metadata["choices"]
            near = suggest(value, legal)
            raise ConfigError(f"{key} cannot be {value!r}{near}; choose one of: {', '.join(legal)}")
        else:
            for bound, (holds, words) in _BOUNDS.items():
                # Not-a-number, which compares false to everything, holds no bound, and is refused too.
                if bound in spec.metadata and not holds(value, spec.metadata[bound]):
                    raise ConfigError(f"{key} must be {words} {spec.metadata[bound]}, not {value}")
        if isinstance(value, list) and any(map(is_dataclass, value)):
            for index, row in enumerate(value):
                check_values(row, f"{key}[{index}].")
    _check_curve(node, prefix)


def _check_curve(node: Any, prefix: str) -> None:
    """Check that a measured curve has as many figures as places, that ascend."""
    roles = {spec.name: spec.metadata["curve"] for spec in fields(node) if "curve" in spec.metadata}
    places = ""
    for name, role in roles.items():
        key, value = prefix + name, getattr(node, name)
        if not all(isinstance(each, int | float) and each > 0 for each in value):
            raise ConfigError(f"{key} must be above 0 everywhere, not {value}")
        if role == "places":
            places = name
            if not value and prefix.endswith(
                "]."
            ):  # one of several curves; a curve alone may never have been measured
                raise ConfigError(f"{key} has no points; give some, or leave the curve out")
            if not all(one < other for one, other in pairwise(value)):
                raise ConfigError(f"{key} must ascend, not {value}")
        elif len(value) != len(getattr(node, places)):
            raise ConfigError(
                f"{key} must have a figure for each of {prefix}{places}'s {len(getattr(node, places))} points, "
                f"not {len(value)}"
            )


def suggest(word: str, legal: list[str] | tuple[str, ...]) -> str:
    """Half a sentence that names the nearest legal word, if one is near."""
    near = get_close_matches(word, legal, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
