"""Numbers as people read them."""

from __future__ import annotations


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
