"""How far each schedule is from the attention it should be, and from the papers' narrow heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from helix.figures.style import DARK, STYLE, TEXT, caption, categories, legend, look, picture, power, require

if TYPE_CHECKING:
    import pandas as pd


@rc_context(STYLE)
def error_of(frame: pd.DataFrame, bounds: Mapping[str, float], *, about: str = "") -> Figure:
    """Relative error of each schedule against each reference, on a logarithmic axis, a panel for each precision.

    An error of exactly 0 has no place on such an axis: it is drawn at its left end, which says 0.

    Args:
        frame: columns `schedule`, `reference` (such as "h heads" and "h*m narrow heads"), `precision` and `error`.
        bounds: of a precision, what rounding may come to; a dashed line.
    """
    require(frame, "schedule", "reference", "precision", "error")
    schedules, references = (list(dict.fromkeys(frame[name])) for name in ("schedule", "reference"))
    precisions = list(dict.fromkeys(frame["precision"]))
    positive = [value for value in (*frame["error"], *bounds.values()) if value > 0]
    nothing = min(positive) / 30  # where 0 is drawn
    chart = picture(TEXT, 0.95 + 0.21 * len(schedules))
    panels = chart.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        own = frame[frame["precision"] == precision]
        for row in own.itertuples():
            reference = references.index(row.reference)
            # Beside each other, so that equal errors do not cover each other.
            at = schedules.index(row.schedule) + 0.24 * (reference - (len(references) - 1) / 2)
            axes.plot([max(row.error, nothing)], [at], clip_on=False, **_marks(reference))
        said = str(precision)
        if precision in bounds:
            axes.axvline(bounds[precision], color=DARK, linewidth=0.9, linestyle="--", zorder=0)
            said += f"; dashed: {bounds[precision]:g}"
        axes.set_title(said)
        _axis(axes, nothing, max(positive))
        categories(axes, schedules)
    panels[0].set_xlabel("relative error", loc="left")
    legend(chart, [Line2D([], [], label=f"against {name}", **_marks(at)) for at, name in enumerate(references)], 3)
    caption(chart, about)
    return chart


def _marks(reference: int) -> dict[str, Any]:
    """Filled and open by turns, where colours are lost."""
    shown = look(reference)
    face = shown["color"] if reference % 2 == 0 else "white"
    return shown | {"linestyle": "none", "markerfacecolor": face}


def _axis(axes: Axes, nothing: float, largest: float) -> None:
    """Powers of ten, and 0 at the left end."""
    axes.set_xscale("log")
    axes.set_xlim(nothing, max(3.0, largest * 3))
    low, high = math.ceil(math.log10(nothing) + 1.5), math.floor(math.log10(axes.get_xlim()[1]))
    step = max(1, (high - low + 4) // 5)
    powers = list(range(high, low - 1, -step))
    axes.set_xticks([nothing, *(10.0**each for each in powers)], ["0", *(power(10.0**each) for each in powers)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
