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

from helix.figures.style import DARK, STYLE, TEXT, caption, legend, look, picture, power
from helix.figures.training import Curve, lines

_HEIGHTS = {False: (1, 1), True: (1.5, 1)}  # of both rows, by whether distances are the main panel


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

    A thin line is a seed; the thick one the mean of all, and the band its interval. Where distances are within
    rounding, they are the main panel, on top, and of the losses, which would lie on each other, only the references'
    are drawn.

    Args:
        distance: what that is, in words; logarithmic: whether its axis is, since it is within rounding.
        averaged: steps that a loss is the mean of.
        about: where all that comes from, in parts.
    """
    compared = any(one.distance for one in drawn)
    rows = math.ceil(len(drawn) / 3)
    chart = picture(TEXT, (4.6 if compared else 2.6) + 0.16 * rows)
    grid = chart.add_gridspec(2 if compared else 1, 2, height_ratios=_HEIGHTS[logarithmic] if compared else None)
    below = int(logarithmic)
    loss, validation = chart.add_subplot(grid[below, 0]), chart.add_subplot(grid[below, 1])
    gap = chart.add_subplot(grid[1 - below, :]) if compared else None
    several = any(one.group for one in drawn)
    for place, one in enumerate(drawn):
        shown = _look(one, several, place)
        if not logarithmic or one.distance is None:
            draw_seeds(loss, one.losses, shown, one.label)
            draw_seeds(validation, one.validations, shown)
        if gap is not None and one.distance is not None:
            draw_seeds(gap, one.distance, shown, one.label if logarithmic else "")
    whose = ("References' training loss", "References' validation") if logarithmic else ("Training loss", "Validation")
    loss.set_title(f"{whose[0]}, bits per byte")
    validation.set_title(f"{whose[1]}, bits per byte")
    panels = [loss, validation, *([gap] if gap is not None else [])]
    for axes in panels:
        axes.set_xlabel("optimizer step")
        lines(axes)
        if not (logarithmic and axes is gap):
            _limit(axes)
    if averaged > 1:
        loss.set_xlabel(f"optimizer step; each point the mean of {averaged}")
    if gap is not None:
        gap.set_title(distance)
        if logarithmic:
            gap.set_yscale("log")
            gap.yaxis.set_major_locator(LogLocator(numticks=8))
            gap.yaxis.set_major_formatter(lambda value, _: power(value))
        else:
            gap.axhline(0, color=DARK, linewidth=1.0)
    legend(chart, [entry for axes in panels for entry in axes.get_legend_handles_labels()[0]], 3)
    caption(chart, *about)
    return chart


def _look(one: Drawn, several: bool, place: int) -> dict[str, Any]:
    """A colour and a marker for each of those that are compared; where there are several references, each one's
    dashes, and markers filled or open by turns. Markers are not all at the same steps: lines may cover each other."""
    shown = look(one.place)
    dashes = look(one.group if several else one.place)["linestyle"]
    face = "white" if one.group % 2 else shown["color"]
    points = max(len(one.losses.steps), 1)
    every = max(1, points // 6)
    marks = {"markevery": (place * every // 6 % points, every), "markersize": 4, "markerfacecolor": face}
    return shown | {"linestyle": dashes} | marks


def draw_seeds(axes: Axes, over: Seeds, shown: dict[str, Any], label: str = "") -> None:
    """Each seed thin, their mean thick and its interval, if there is one, as a band; one seed alone as a line.

    Args:
        shown: the look of the line, as `look` has it and perhaps more.
    """
    steps = np.asarray(over.steps)
    if len(steps) < 3 * shown["markevery"][1]:  # validations are few: a marker at each
        shown = shown | {"markevery": 1}
    if over.mean is None:
        axes.plot(steps, over.values[0], label=label, **shown)
        return
    for each in over.values:
        axes.plot(steps, each, color=shown["color"], linewidth=0.5, alpha=0.5)
    if over.low is not None and over.high is not None:
        axes.fill_between(steps, over.low, over.high, color=shown["color"], alpha=0.15, linewidth=0)
    axes.plot(steps, over.mean, label=label, **({"linewidth": 1.6} | shown))


def _limit(axes: Axes) -> None:
    """Leave to the bands half the height of the lines: over two seeds they are as wide as the whole loss."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines])
    low, high = np.nanmin(values), np.nanmax(values)
    bottom, top = axes.get_ylim()
    if low < high:
        axes.set_ylim(max(bottom, low - (high - low) / 2), min(top, high + (high - low) / 2))
