"""Pictures of plans: what there is to choose between."""

from __future__ import annotations

from collections.abc import Sequence

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
    front = sorted(plan.pareto, key=lambda one: (one.memory.total, -one.tokens_per_s))
    axes.plot(*_points(_rising(front)), color="0.75", linewidth=1, zorder=1, drawstyle="steps-post")
    label = "nothing beats these in speed, latency and memory at once"
    axes.scatter(*_points(front), s=14, color="0.5", zorder=1, label=label)
    shades = colormaps[MAP]
    for place, one in enumerate(plan.rivals):
        shade = shades(place / max(1, len(plan.rivals) - 1) * 0.85)
        marker = _MARKERS[place % len(_MARKERS)]
        name = f"{kind(one.layout)}: {one.layout.name}"
        axes.scatter(*_points([one]), s=55, color=[shade], marker=marker, zorder=2, label=name)
    axes.set_xlabel("memory of the fullest device, GB")
    axes.set_ylabel("tokens/s, modelled")
    shown = [*front, *plan.rivals]  # with room for a marker that lies on an edge
    axes.set_ylim(0, 1.08 * max(one.tokens_per_s for one in shown))
    axes.set_xlim(0, 1.05 * max(one.memory.total for one in shown) / 1e9)
    axes.yaxis.set_major_formatter(lambda value, _: figure(value))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, loc="best")
    axes.set_title(f"Layouts of {plan.model} on {plan.devices} devices of {plan.hardware}")
    work = plan.work
    caption(chart, f"{work.mode}, batch {work.batch} x {work.length}, {work.precision}", plan.band.split(":")[0])
    return chart


def _rising(front: Sequence[Estimate]) -> list[Estimate]:
    """Of layouts by their memory, those that are faster than all that need less."""
    out: list[Estimate] = []
    for one in front:
        if not out or one.tokens_per_s > out[-1].tokens_per_s:
            out.append(one)
    return out


def _points(rows: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    return [one.memory.total / 1e9 for one in rows], [one.tokens_per_s for one in rows]
