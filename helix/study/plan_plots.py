"""Pictures of plans: what there is to choose between."""

from __future__ import annotations

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from helix.config.words import figure
from helix.planner.plan import Plan
from helix.planner.search import kind
from helix.planner.work import Estimate
from helix.study.plots import MAP, STYLE, caption

_MARKERS = "osD^vPX"


@rc_context(STYLE)
def pareto_chart(plan: Plan) -> Figure:
    """Tokens/s over memory of a device: layouts that nothing beats, on a line, and the best of each method."""
    chart = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = chart.subplots()
    front = sorted(plan.pareto, key=lambda one: one.memory.total)
    axes.plot(*_points(front), color="0.6", linewidth=1, zorder=1, marker=".", label="nothing beats these in all")
    shades = colormaps[MAP]
    for place, one in enumerate(plan.rivals):
        shade = shades(place / max(1, len(plan.rivals) - 1) * 0.85)
        marker = _MARKERS[place % len(_MARKERS)]
        name = f"{kind(one.layout)}: {one.layout.name}"
        axes.scatter(*_points([one]), s=55, color=[shade], marker=marker, zorder=2, label=name)
    axes.set_xlabel("memory of the fullest device, GB")
    axes.set_ylabel("tokens/s, modelled")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda value, _: figure(value))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, loc="best")
    axes.set_title(f"Layouts of {plan.model} on {plan.devices} devices of {plan.hardware}")
    work = plan.work
    caption(chart, f"{work.mode}, batch {work.batch} x {work.length}, {work.precision}", plan.band.split(":")[0])
    return chart


def _points(rows: list[Estimate]) -> tuple[list[float], list[float]]:
    return [one.memory.total / 1e9 for one in rows], [one.tokens_per_s for one in rows]
