"""A claim's figures as people read them."""

from __future__ import annotations

from collections.abc import Callable

from helix.claims.resolve import Found
from helix.config.words import figure, size


def _millions(value: float) -> str:
    return f"{value / 1e6:.3g} M"


def _bare(value: float) -> str:
    return f"{value:.3g}"


def _factor(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value * 100:.3g}"


# By unit: how a number is written, and what follows it.
_FORMS: dict[str, tuple[Callable[[float], str], str]] = {
    "tokens/s": (_millions, " tokens/s"),
    "bytes": (size, ""),
    "bytes/s": (size, "/s"),
    "ms": (_bare, " ms"),
    "s": (_bare, " s"),
    "share": (_percent, " %"),
    "times": (_factor, " times"),
    "count": (figure, ""),
    "p": (_bare, ""),
    "bits": (_bare, " bits"),
    "error": (_bare, ""),
}


def shown(value: float, unit: str, interval: tuple[float, float] | None = None) -> str:
    """A figure with its unit, and its interval in brackets."""
    form, after = _FORMS[unit]
    ends = "" if interval is None else f" ({form(interval[0])} .. {form(interval[1])})"
    return f"{form(value)}{ends}{after}"


def said(found: Found) -> str:
    """One of our figures with what it is of and where it comes from."""
    return f"{found.label}: {shown(found.value, found.unit, found.interval)}, {found.kind}"
