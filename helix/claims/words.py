"""A claim's figures as people read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from helix.claims.resolve import Found
from helix.config.schema import ConfigError
from helix.config.words import figure, size

_PLACE = re.compile(r"\{(.*?)\}")


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


def filled(text: str, figures: Sequence[Found]) -> str:
    """A text on one line with {0}, {1} replaced by our figures of these places.

    Raises:
        ConfigError: if there is no such place.
    """

    def figure_at(place: re.Match[str]) -> str:
        number = place[1]
        if not number.isdecimal() or int(number) >= len(figures):
            raise ConfigError(f"{place.group()} names none of the {len(figures)} figures of ours, counted from {{0}}")
        one = figures[int(number)]
        return shown(one.value, one.unit)

    return _PLACE.sub(figure_at, " ".join(text.split()))
