"""Numbers and types as people read them."""

from __future__ import annotations

from typing import Any, get_args

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def kinds(hint: Any) -> str:
    """What a value of an annotation may be; empty of those that are no scalars."""
    given = get_args(hint) or (hint,)
    words = [_KINDS[kind] for kind in given if kind in _KINDS]
    return " or ".join(words + (["null"] if words and type(None) in given else []))


def figure(value: float) -> str:
    """A number to four significant digits, or whole and grouped by thousands from 1000 up, up to 1e9."""
    if value == 0:
        return "0"
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
