"""Maps of where slicing features wins: small multiples of the best layout with m > 1 against the best other one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from helix.figures.style import STYLE, TEXT, caption, cell, picture

# From yellow by a light grey, at 1, to blue: two colours that stay apart for every kind of colour vision; the better
# m > 1 is, the darker, in grey too. Every cell has its figure, bold above 1.
_COLOURS = LinearSegmentedColormap.from_list("winning", ("#FFEC8B", "#C2C2C2", "#08306B"))
_NORM = LogNorm(1 / 2, 2, clip=True)
_HATCH = "0.35"
_NOTHING: dict[str, Any] = {"facecolor": "0.93", "edgecolor": "0.55", "hatch": "....", "linewidth": 0}


@rc_context(STYLE)
def winning_map(panels: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """A panel for each pair of quantities; the colour is how many times as good the best layout with m > 1 is.

    Hatched: nothing but m > 1 divides the model and fits. White with a dash: no m > 1 does, others do. Dotted: nothing
    fits. Empty: there is no such place, as a batch of half a sequence.

    Args:
        panels: at most three, as `python -m helix plan --map --json` writes them, under "map".
        title: the model, the hardware and the work.
    """
    chart = picture(TEXT, 5.0)
    *spots, legend = chart.subplots(2, 2).flat
    for axes, panel in zip(spots, panels, strict=False):
        _panel(axes, panel)
    for axes in (*spots[len(panels) :], legend):
        axes.set_axis_off()
    _key(chart, legend)
    words = f"Best layout with m > 1, times as good as the best of all others: {panels[0]['goal']}"
    chart.suptitle(words, x=0.01, ha="left", fontsize=9)
    rivals = f"rivals: {', '.join(panels[0]['rivals'])} and their products"
    caption(chart, title, rivals, "modelled, nothing fitted: a few per cent either way are a tie")
    return chart


def _key(chart: Figure, axes: Axes) -> None:
    """The colours and the three kinds of cells without a figure, where a fourth panel would be."""
    bar = chart.colorbar(
        ScalarMappable(_NORM, _COLOURS),
        cax=axes.inset_axes((0.06, 0.82, 0.88, 0.07)), orientation="horizontal",
        ticks=[0.5, 0.7, 1, 1.4, 2], format=lambda value, _: f"{value:.3g}", extend="both", label="m > 1 / all others",
    )  # fmt: skip
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    hatched: dict[str, Any] = {"facecolor": "white", "edgecolor": _HATCH, "hatch": "////", "linewidth": 0}
    keys = [
        Patch(label="nothing but m > 1 divides it and fits", **hatched),
        Patch(facecolor="white", edgecolor="0.7", label="- : no m > 1 divides it and fits"),
        Patch(label="nothing fits", **_NOTHING),
    ]
    axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.0, 0.52))


def _panel(axes: Axes, panel: Mapping[str, Any]) -> None:
    xs, ys = (list(dict.fromkeys(one[name] for one in panel["cells"])) for name in "xy")
    for one in panel["cells"]:
        _cell(axes, one, xs.index(one["x"]), ys.index(one["y"]))
    axes.set(xlim=(-0.5, len(xs) - 0.5), ylim=(-0.5, len(ys) - 0.5))
    axes.set_xticks(range(len(xs)), xs)
    axes.set_yticks(range(len(ys)), ys)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=panel["x"], ylabel=panel["y"], title=textwrap.fill(panel["fixed"], 40))


def _cell(axes: Axes, one: Mapping[str, Any], column: int, row: int) -> None:
    if not one["legal"]:
        return
    face: Any = "white"
    hatch, said, ratio = "", "-", one["ratio"]
    if ratio is not None:
        face, said = _COLOURS(_NORM(ratio)), f"{ratio:.2f}"
    elif one["sliced"] is not None:
        hatch, said = "////", "only"
    elif one["rival"] is None:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **_NOTHING))
        return
    cell(axes, column, row, said, face, hatch=hatch, bold=ratio is not None and ratio > 1.005)
