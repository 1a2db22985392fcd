"""How bytes, time and error of each schedule grow: measured points, and closed forms drawn through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from helix.config.words import figure, size
from helix.figures.style import SCHEDULES, STYLE, TEXT, caption, legend, picture, require

if TYPE_CHECKING:
    import pandas as pd


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
        curve = lines[lines["schedule"] == schedule]
        look = SCHEDULES[schedule]
        marks = look | {"linestyle": "none", "label": schedule}
        line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.0}
        if own["bytes"].any():
            panels[0].plot(own["x"], own["bytes"], **marks)
            panels[0].plot(curve["x"], curve["bytes"], **line)
        spread = [own["step_ms"] - own["low"], own["high"] - own["step_ms"]]
        panels[1].errorbar(own["x"], own["step_ms"], yerr=spread, elinewidth=0.9, **marks)
        panels[1].plot(curve["x"], curve["step_ms"], **line)
        panels[2].plot(own["x"], own["error"], **(marks | {"linestyle": look["linestyle"]}))
    _label(panels, sorted(set(points["x"])), x_name)
    legend(chart, panels[1].get_legend_handles_labels()[0], 6)
    caption(chart, about)
    return chart


def _label(panels: Sequence[Axes], xs: Sequence[int], x_name: str) -> None:
    titles = ("Bytes sent inside attention", "Time of a step, ms", "Relative error to h heads")
    formats: tuple[Callable[[float], str], ...] = (
        lambda value: size(round(value)),
        figure,
        lambda value: f"$10^{{{round(np.log10(value))}}}$",
    )
    for axes, title, text in zip(panels, titles, formats, strict=True):
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(xs)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.yaxis.set_major_formatter(_formatter(text))
        axes.grid()
    panels[1].set_xlabel(x_name)
    panels[2].set_ylim(1e-8, 3)


def _formatter(text: Callable[[float], str]) -> Callable[[float, float], str]:
    """As matplotlib calls it, with a place that does not matter here."""
    return lambda value, place: text(value)
