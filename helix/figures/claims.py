"""What the papers claim, beside what was found here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helix.config.words import figure
from helix.figures.ratios import KINDS, in_words
from helix.figures.style import STYLE, TEXT, above_0, caption, categories, legend, log_ticks, note, picture, require

if TYPE_CHECKING:
    import pandas as pd

_BETWEEN = 0.55  # inches between panels: ticks and the unit
_CLAIMED: dict[str, Any] = {"marker": "|", "markersize": 9, "markeredgewidth": 2, "color": "#D55E00"}


@rc_context(STYLE)
def claimed_and_found(frame: pd.DataFrame, *, about: str = "") -> Figure:
    """A panel for each unit, a row for each claim: the claimed value (a bar) and ours (a point with its interval).

    Args:
        frame: columns `claim`, `unit`, `claimed`, `found` and `kind` (measured or modelled); perhaps `low` and `high`
            of what was found, and `claimed_low`, `claimed_high`. Missing intervals are NaN. All values above 0.
    """
    require(frame, "claim", "unit", "claimed", "found", "kind")
    above_0(frame, "claimed", "found", "low", "high", "claimed_low", "claimed_high")
    units = list(dict.fromkeys(frame["unit"]))
    counts = [int((frame["unit"] == unit).sum()) for unit in units]
    heights = [0.22 * count + 0.06 for count in counts]
    chart = picture(TEXT, 0.35 + sum(heights) + _BETWEEN * len(units))
    panels = chart.subplots(len(units), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, unit in zip(panels, units, strict=True):
        own = frame[frame["unit"] == unit].to_dict("records")
        for place, row in enumerate(own):
            _draw(axes, place, row)
        categories(axes, [str(row["claim"]) for row in own])
        _axis(axes, unit, [value for row in own for value in _values(row)])
    chart.align_xlabels(panels)
    line: dict[str, Any] = {"linewidth": 1, "color": "black"}
    ours = [
        Line2D([], [], marker=KINDS[kind], markerfacecolor=_face(kind), label=f"{kind} here", **line)
        for kind in KINDS
        if kind in set(frame["kind"])
    ]
    legend(chart, [Line2D([], [], linestyle="none", label="claimed", **_CLAIMED), *ours], 3)
    caption(chart, about)
    return chart


def _face(kind: str) -> str:
    return "black" if kind == "measured" else "white"


def _draw(axes: Axes, place: int, row: dict[str, Any]) -> None:
    claimed, found, kind = float(row["claimed"]), float(row["found"]), row["kind"]
    ends = _interval(row, "claimed_low", "claimed_high")
    if ends:
        axes.plot(ends, [place, place], color=_CLAIMED["color"], linewidth=2.5, alpha=0.45, solid_capstyle="butt")
    axes.plot([claimed, found], [place, place], color="0.75", linewidth=0.7, linestyle=":", zorder=0)
    axes.plot(claimed, place, linestyle="none", **_CLAIMED)
    if ends := _interval(row, "low", "high"):
        axes.plot(ends, [place, place], color="black", linewidth=1.0)
    axes.plot(found, place, KINDS[kind], color="black", markerfacecolor=_face(kind))
    said = f"{figure(claimed)} claimed, {in_words(found, *ends) if ends and found < 100 else figure(found)} found"
    note(axes, place, said)


def _interval(row: dict[str, Any], low: str, high: str) -> list[float]:
    """Both ends, or nothing where there is no interval."""
    ends = [float(row[name]) for name in (low, high) if row.get(name) is not None]
    return ends if len(ends) == 2 and ends[0] == ends[0] else []


def _values(row: dict[str, Any]) -> list[float]:
    found = [*_interval(row, "low", "high"), *_interval(row, "claimed_low", "claimed_high")]
    return [float(row["claimed"]), float(row["found"]), *found]


def _axis(axes: Axes, unit: str, values: list[float]) -> None:
    log_ticks(axes, min(values) / 1.25, max(values) * 1.25, figure)
    axes.set_xlabel(unit, labelpad=1)
