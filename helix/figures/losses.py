"""Losses of trainings: seeds thin, their mean thick, and below them how far each setting is from the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helix.figures.settings import Seeds, draw_seeds
from helix.figures.style import DARK, STYLE, TEXT, caption, legend, look, picture, require

if TYPE_CHECKING:
    import pandas as pd


@rc_context(STYLE)
def curves(
    frame: pd.DataFrame, *, smooth: int = 1, unit: str = "nats per token", wide: float = TEXT, about: str = ""
) -> Figure:
    """Training losses of several settings over their steps; below, each setting's difference to the first one.

    Args:
        frame: columns `setting`, `seed`, `step` and `loss`. Differences are taken at equal seeds and steps.
        smooth: steps over which a loss is averaged, up to the step it is drawn at.
        unit: of the loss.
        wide: inches.

    Raises:
        ValueError: if smooth is below 1 or above the number of steps.
    """
    require(frame, "setting", "seed", "step", "loss")
    tables = {
        str(name): own.pivot(index="step", columns="seed", values="loss").sort_index()
        for name, own in frame.groupby("setting", sort=False)
    }
    most = min(len(table) for table in tables.values())
    if not 1 <= smooth <= most:
        raise ValueError(f"smooth must be 1 to {most} steps, not {smooth}")
    smoothed = {name: table.rolling(smooth).mean().dropna(how="all") for name, table in tables.items()}
    first, *others = smoothed
    chart = picture(wide, 3.6 if others else 2.4)
    if others:
        above, below = chart.subplots(2, 1, sharex=True, height_ratios=(1.8, 1))
    else:
        above = below = chart.subplots()
    for place, (name, table) in enumerate(smoothed.items()):
        _seeds(above, table, place, name)
        if name != first:
            _seeds(below, (table - smoothed[first]).dropna(how="all").dropna(axis=1, how="all"), place, "")
    above.set_ylabel(unit)
    above.set_title("Training loss" + (f", mean of {smooth} steps" if smooth > 1 else ""))
    if others:
        below.axhline(0, color=DARK, linewidth=0.8)
        below.set_ylabel(unit)
        below.set_title(f"Difference to {first}, at equal seeds")
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(8 if wide > 5 else 4, integer=True))
    for axes in dict.fromkeys((above, below)):
        axes.grid()
        axes.margins(x=0.01)
    legend(chart, above.get_legend_handles_labels()[0], 4 if wide > 5 else 2)
    caption(chart, about)
    return chart


def _seeds(axes: Axes, table: pd.DataFrame, place: int, label: str) -> None:
    """Each column a seed."""
    steps = np.asarray(table.index, dtype=float)
    every = max(1, len(steps) // 8)
    marks: dict[str, Any] = {"markevery": (place * every // 3, every), "markersize": 3.5}  # not all at the same steps
    mean = table.mean(axis=1).to_numpy() if table.shape[1] > 1 else None
    draw_seeds(axes, Seeds(steps, table.to_numpy().T, mean), look(place) | marks, label)
