"""Maps of where slicing features wins: small multiples of the best layout with m > 1 against the best other one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from helix.planner.winning import Cell, Panel
from helix.study.plots import STYLE, caption

# Two colours that stay apart for every kind of colour vision; 1 is white, and every cell has its figure.
_DIVERGING, _NORM = "PuOr", LogNorm(1 / 2, 2, clip=True)
_NOTHING, _HATCH = "0.80", "0.35"


@rc_context(STYLE)
def winning_chart(panels: Sequence[Panel], title: str) -> Figure:
    """A panel for each pair of quantities; the colour is how many times as good the best layout with m > 1 is.

    Hatched: nothing but m > 1 divides the model and fits. White with a dash: m > 1 does not, others do. Grey: nothing
    fits. Empty: there is no such place, as a batch of half a sequence.
    """
    chart = Figure(figsize=(14, 4.6), layout="constrained")
    subplots = chart.subplots(1, len(panels), width_ratios=[max(5, len(_labels(one)[0])) for one in panels])
    for axes, panel in zip(subplots, panels, strict=True):
        _panel(axes, panel)
    bar = chart.colorbar(
        ScalarMappable(_NORM, colormaps[_DIVERGING]),
        ax=list(subplots), pad=0.01, aspect=30, ticks=[0.5, 0.7, 1, 1.4, 2], format=lambda value, _: f"{value:.3g}",
        extend="both", label="m > 1 / all others",
    )  # fmt: skip
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    keys = [
        Patch(facecolor="white", edgecolor=_HATCH, hatch="////", linewidth=0, label="only m > 1 divides it and fits"),
        Patch(facecolor="white", edgecolor="0.7", label="- : no m > 1 divides it and fits"),
        Patch(facecolor=_NOTHING, label="nothing fits"),
    ]
    chart.legend(handles=keys, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    words = f"Best layout with m > 1, times as good as the best of all others: {panels[0].goal}"
    chart.suptitle(words, x=0.01, ha="left")
    rivals = f"rivals: {', '.join(panels[0].rivals)} and their products"
    caption(chart, title, rivals, "modelled, nothing fitted: a few per cent either way are a tie")
    return chart


def _labels(panel: Panel) -> tuple[list[str], list[str]]:
    """Of both axes, in the order of the cells."""
    return list(dict.fromkeys(one.x for one in panel.cells)), list(dict.fromkeys(one.y for one in panel.cells))


def _panel(axes: Axes, panel: Panel) -> None:
    xs, ys = _labels(panel)
    for one in panel.cells:
        _cell(axes, one, xs.index(one.x), ys.index(one.y))
    axes.set(xlim=(-0.5, len(xs) - 0.5), ylim=(-0.5, len(ys) - 0.5))
    axes.set_xticks(range(len(xs)), xs)
    axes.set_yticks(range(len(ys)), ys)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(panel.x_name)
    axes.set_ylabel(panel.y_name)
    axes.set_title(panel.fixed, fontsize=9)


def _cell(axes: Axes, one: Cell, column: int, row: int) -> None:
    if not one.legal:
        return
    face: Any = "white"
    ink, hatch, said = "black", "", "-"
    if one.ratio is not None:
        face, said = colormaps[_DIVERGING](_NORM(one.ratio)), f"{one.ratio:.2f}"
        ink = "white" if not 0.6 < one.ratio < 1.7 else "black"
    elif one.sliced is not None:
        hatch, said = "////", "only"
    elif one.rival is None:
        face, said = _NOTHING, ""
    edge = _HATCH if hatch else "0.85"
    look: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "hatch": hatch, "linewidth": 0.5}
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if hatch else None
    weight = "bold" if one.ratio is not None and one.ratio > 1.005 else "normal"
    axes.text(column, row, said, ha="center", va="center", fontsize=8.5, color=ink, weight=weight, bbox=box)
