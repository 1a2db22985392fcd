"""A sweep of trainings: its settings beside each other over their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from helix.figures.style import DARK, STYLE, TEXT, caption, legend, look, picture
from helix.figures.training import Curve, lines


@dataclass(frozen=True)
class Seeds:
    """One quantity of one setting.

    Args:
        steps: [S] where it is known.
        values: [seeds, S].
        mean, low, high: [S] over seeds, with the ends of an interval; None of one seed.
    """

    steps: Curve
    values: Curve
    mean: Curve | None = None
    low: Curve | None = None
    high: Curve | None = None


@dataclass(frozen=True)
class Drawn:
    """One setting.

    Args:
        place: among those that are held against one reference, which gives it its colour.
        group: which reference that is; where there are several, it gives the dashes.
        losses, validations: in bits per byte.
        distance: to the reference, where it has one.
    """

    label: str
    place: int
    group: int
    losses: Seeds
    validations: Seeds
    distance: Seeds | None = field(default=None)


@rc_context(STYLE)
def settings(drawn: Sequence[Drawn], distance: str, logarithmic: bool, averaged: int, *about: str) -> Figure:
    """Training loss and validation of each setting; and, where something is compared, its distance to the reference.

    A thin line is a seed; the thick one the mean of all, and the band its interval.

    Args:
        distance: what that is, in words; logarithmic: whether its axis is.
        averaged: steps that a loss is the mean of.
        about: where all that comes from, in parts.
    """
    compared = any(one.distance for one in drawn)
    rows = math.ceil(len(drawn) / 3)
    chart = picture(TEXT, (4.6 if compared else 2.6) + 0.16 * rows)
    grid = chart.add_gridspec(2 if compared else 1, 2)
    panels = [chart.add_subplot(grid[0, 0]), chart.add_subplot(grid[0, 1])]
    panels += [chart.add_subplot(grid[1, :])] if compared else []
    for one in drawn:
        shown = _look(one, several=any(other.group for other in drawn))
        _draw(panels[0], one.losses, shown, one.label)
        _draw(panels[1], one.validations, shown)
        if one.distance is not None:
            _draw(panels[2], one.distance, shown)
    panels[0].set_title("Training loss, bits per byte")
    panels[1].set_title("Validation, bits per byte")
    for axes in panels:
        axes.set_xlabel("optimizer step")
        lines(axes)
        _limit(axes)
    if averaged > 1:
        panels[0].set_xlabel(f"optimizer step; each point the mean of {averaged}")
    if compared:
        panels[2].set_title(distance)
        if logarithmic:
            panels[2].set_yscale("log")
            panels[2].yaxis.set_major_locator(LogLocator(numticks=8))
        else:
            panels[2].axhline(0, color=DARK, linewidth=1.0)
    legend(chart, panels[0].get_legend_handles_labels()[0], 3)
    caption(chart, *about)
    return chart


def _look(one: Drawn, several: bool) -> dict[str, Any]:
    """A colour for each of those that are compared; where there are several references, dashes for each one's."""
    return {"color": look(one.place)["color"], "linestyle": look(one.group if several else one.place)["linestyle"]}


def _draw(axes: Axes, over: Seeds, shown: dict[str, Any], label: str = "") -> None:
    """Each seed thin, their mean thick and its interval as a band; one seed alone as a line."""
    if over.mean is None or over.low is None or over.high is None:
        axes.plot(over.steps, over.values[0], label=label, **shown)
        return
    for each in over.values:
        axes.plot(over.steps, each, color=shown["color"], linewidth=0.5, alpha=0.5)
    axes.fill_between(over.steps, over.low, over.high, color=shown["color"], alpha=0.15, linewidth=0)
    axes.plot(over.steps, over.mean, linewidth=1.6, label=label, **shown)


def _limit(axes: Axes) -> None:
    """Leave to the bands half the height of the lines: over two seeds they are as wide as the whole loss."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines])
    low, high = np.nanmin(values), np.nanmax(values)
    bottom, top = axes.get_ylim()
    if low < high:
        axes.set_ylim(max(bottom, low - (high - low) / 2), min(top, high + (high - low) / 2))
