"""A calibration, for people. Readable from 80 columns up."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.calibration.results import Calibration
from helix.config.hardware import MeasuredExchange
from helix.config.words import figure, size


def render(found: Calibration) -> RenderableType:
    """What was measured, for any rich console: figures with their intervals, then curves by their medians."""
    blank, hardware = Text(), found.hardware
    parts: list[RenderableType] = [
        Text(hardware.name, style="bold"),
        Text(hardware.source),
        blank,
        _alone(found),
        blank,
        _products(found),
        blank,
        _attention(found),
    ]
    if hardware.exchanges:
        parts += [blank, _exchanges(found)]
    parts += [blank, Text(_spread(found), style="dim")]
    return Group(*parts)


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title, no_wrap=True)
    return table


def _alone(found: Calibration) -> Table:
    table = _table("of one device")
    for column in ("median", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for key, one in found.intervals.items():
        table.add_row(key, figure(one.value), f"{figure(one.low)} .. {figure(one.high)}")
    return table


def _products(found: Calibration) -> Table:
    curve = found.hardware.products
    table = _table("matrix products, smallest dim")
    for width in curve.width:
        table.add_column(str(width), justify="right", no_wrap=True)
    table.add_row("of the peak", *map(_percent, curve.share))
    return table


def _attention(found: Calibration) -> Table:
    table = _table("causal attention, head dim")
    rows = found.hardware.attention
    for length in rows[0].length:
        table.add_column(f"{length} tokens", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row.head_dim), *map(_percent, row.share))
    return table


def _exchanges(found: Calibration) -> Table:
    """Of groups that are a whole job: those of smaller ones are in the file."""
    rows = [row for row in found.hardware.exchanges if row.group == row.ranks]
    table = _table("collectives, ms")
    table.add_column("ranks", justify="right")
    for nbytes in found.points.sizes:
        table.add_column(size(nbytes), justify="right", no_wrap=True)
    for kind in dict.fromkeys(row.kind for row in rows):
        for row in (each for each in rows if each.kind == kind):
            table.add_row(kind, str(row.ranks), *_milliseconds(row, found.points.sizes))
    return table


def _milliseconds(row: MeasuredExchange, sizes: Sequence[int]) -> list[str]:
    """At the points that are nearest to these sizes: a group's own are multiples of its ranks, and there are more."""
    nearest = (min(zip(row.bytes, row.us, strict=True), key=lambda point: abs(point[0] - size)) for size in sizes)
    return [f"{us / 1e3:.3g}" for _, us in nearest]


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _spread(found: Calibration) -> str:
    """How far the intervals of the curves reach."""
    hardware = found.hardware
    products = hardware.products
    computed = [(products.low, products.share, products.high)]
    computed += [(row.low, row.share, row.high) for row in hardware.attention]
    words = f"half of the intervals of products and attention are within {_percent(_half(computed))} of their median"
    if hardware.exchanges:
        exchanged = [(row.low, row.us, row.high) for row in hardware.exchanges]
        words += f", of collectives within {_percent(_half(exchanged))}"
    return f"{words}; medians of {found.points.rounds} passes"


def _half(curves: Sequence[tuple[list[float], list[float], list[float]]]) -> float:
    """The median part of its figure by which an interval reaches beyond it."""
    reach = [
        max(high - value, value - low) / value
        for lows, values, highs in curves
        for low, value, high in zip(lows, values, highs, strict=True)
    ]
    return sorted(reach)[len(reach) // 2]
