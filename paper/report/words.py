"""Numbers as they are printed. Spaces within a number and before its unit do not break."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from helix.config import words

SPACE = "\u00a0"
TIMES = "\u00d7"
TO = "\u2060\u2013\u2060"  # an en dash at which no line breaks
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(value: float, digits: int = 3) -> str:
    """Significant digits, thousands grouped."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def fixed(value: float, places: int = 2) -> str:
    text = f"{value:,.{places}f}"
    return text.replace("-", "\u2212")


def error(value: float) -> str:
    """A relative error: two digits and a power of ten; 0 as such."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}{SPACE}{TIMES}{SPACE}10{str(int(exponent)).translate(_RAISED)}"


def percent(share: float, places: int = 0) -> str:
    return f"{fixed(100 * share, places)}{SPACE}%"


def size(count: float) -> str:
    """Bytes in decimal units."""
    return words.size(count).replace(" ", SPACE)


def interval(low: float, high: float, places: int = 2) -> str:
    return f"({fixed(low, places)}{TO}{fixed(high, places)})"


def ratio(paired: dict[str, Any]) -> str:
    """Of a report's `paired` or a bench's `speed_ratio`: the ratio with its interval."""
    return f"{fixed(paired['ratio'])}{SPACE}{interval(*paired['ci95'])}"


def summary(found: dict[str, Any], places: int = 2) -> str:
    """Of a report's summary over runs: mean with interval."""
    low, high = found["ci95"]
    return f"{fixed(found['mean'], places)}{SPACE}{interval(low, high, places)}"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def spelled(count: int) -> str:
    """A small count as a word."""
    return ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")[count]


def typeset(text: str) -> str:
    """The ledger's plain text as it is printed: powers of ten, ranges and signs."""
    text = re.sub(r"\b\d(?:\.\d+)?e[-+]\d+\b", lambda found: error(float(found.group())), text)
    return text.replace(" .. ", TO).replace("+-", "\u00b1").replace("-inf", "\u2212\u221e")


def breakable(text: str) -> str:
    """Long names of tests and files, which may be broken after their joints."""
    return re.sub(r"(::|[_/=])", "\\1\u200b", text)
