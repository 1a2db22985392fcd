"""How bytes, time and error of each schedule grow: measured points, and closed forms drawn through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from helix.config.words import figure, size
from helix.figures.style import SCHEDULES, STYLE, TEXT, caption, legend, picture, power, require

if TYPE_CHECKING:
    import pandas as pd

_TITLES = ("Bytes sent inside attention", "Time of a step, ms", "Relative error to h heads")


@rc_context(STYLE)
def growth(points: pd.DataFrame, lines: pd.DataFrame, x_name: str, about: str = "") -> Figure:
    """Three panels over x, both axes logarithmic: bytes inside attention, time of a step, error.

    Args:
        points: measured: `schedule`, `x`, `bytes`, `step_ms` with its interval `low`, `high`, and `error`, relative to
            the attention with h heads.
        lines: closed forms: `schedule`, `x`, `bytes`, `step_ms`.
        x_name: what x is.
    """
    require(points, "schedule", "x", "bytes", "step_ms", "low", "high", "error")
    require(lines, "schedule", "x", "bytes", "step_ms")
    chart = picture(TEXT, 2.85)
    panels = chart.subplots(1, 3)
    for schedule in (name for name in SCHEDULES if name in set(points["schedule"])):
        own = points[points["schedule"] == schedule].sort_values("x")
        curve = lines[lines["schedule"] == schedule].sort_values("x")
        marks, line = _looks(schedule)
        spread = [own["step_ms"] - own["low"], own["high"] - own["step_ms"]]
        panels[1].errorbar(own["x"], own["step_ms"], yerr=spread, elinewidth=0.9, **marks)
        panels[1].plot(curve["x"], curve["step_ms"], **line)
        panels[2].plot(own["x"], own["error"], **(marks | {"linestyle": line["linestyle"]}))
    _draw_bytes(panels[0], points, lines)
    xs = sorted(set(points["x"]))
    for axes, title, text in zip(panels, _TITLES, (_bytes, figure, power), strict=True):
        axes.set_title(title)
        _logarithmic(axes, xs, text)
    panels[1].set_xlabel(x_name)
    panels[2].set_ylim(1e-8, 3)
    legend(chart, panels[1].get_legend_handles_labels()[0], 6)
    caption(chart, about)
    return chart


@rc_context(STYLE)
def bytes_inside(
    points: pd.DataFrame,
    lines: pd.DataFrame,
    x_name: str = "L, tokens of one sequence",
    *,
    wide: float = TEXT,
    about: str = "",
) -> Figure:
    """Bytes that each schedule sends inside attention, both axes logarithmic; one that sends none is left out.

    Args:
        points: counted: `schedule`, `x`, `bytes`.
        lines: closed forms, the same columns, perhaps at more x.
        x_name: what x is.
        wide: inches.
    """
    require(points, "schedule", "x", "bytes")
    require(lines, "schedule", "x", "bytes")
    chart = picture(wide, 2.7 if wide > 5 else 2.5)
    axes = chart.subplots()
    _draw_bytes(axes, points, lines)
    _logarithmic(axes, sorted({*points["x"], *(x for x in lines["x"] if math.log2(x).is_integer())}), _bytes)
    axes.set(xlabel=x_name, ylabel="bytes inside attention")
    axes.legend(loc="upper left")
    caption(chart, about)
    return chart


def _draw_bytes(axes: Axes, points: pd.DataFrame, lines: pd.DataFrame) -> None:
    for schedule in (name for name in SCHEDULES if name in set(points["schedule"])):
        own = points[(points["schedule"] == schedule) & (points["bytes"] > 0)]
        curve = lines[(lines["schedule"] == schedule) & (lines["bytes"] > 0)].sort_values("x")
        if len(own):
            marks, line = _looks(schedule)
            # `batch` and `heads` send as many bytes: the one below has to be seen around the other.
            larger = {"markersize": 8} if schedule == "batch" else {}
            axes.plot(own["x"], own["bytes"], **(marks | larger))
            axes.plot(curve["x"], curve["bytes"], **line)


def _looks(schedule: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of what is measured, and of the line through it."""
    look = SCHEDULES[schedule]
    line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.0}
    return look | {"linestyle": "none", "label": schedule}, line


def _logarithmic(axes: Axes, xs: Sequence[float], text: Callable[[float], str]) -> None:
    """Both axes, with a tick at each of these x."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(xs)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: text(value))
    axes.grid()


def _bytes(value: float) -> str:
    return size(round(value))
