"""Pictures of plans: what there is to choose between."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps, rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helix.config.words import figure
from helix.planner.plan import Plan
from helix.planner.search import kind
from helix.planner.winning import Cell
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


@rc_context(STYLE)
def winning_chart(plan: Plan, cells: Sequence[Cell]) -> Figure:
    """How many times as good as the best other layout the best one with m > 1 is, over devices and batch.

    A cell says "only" where no other layout fits or divides the heads, and is empty where no layout with m > 1 does.
    """
    devices, batches = sorted({one.devices for one in cells}), sorted({one.batch for one in cells})
    chart = Figure(figsize=(1.6 + 0.55 * len(devices), 1.9 + 0.5 * len(batches)), layout="constrained")
    axes = chart.subplots()
    shades, norm = colormaps[MAP], Normalize(0.5, 1.1, clip=True)
    for one in cells:
        place = devices.index(one.devices), batches.index(one.batch)
        corner = (place[0] - 0.5, place[1] - 0.5)
        said = "" if one.sliced is None else "only" if one.ratio is None else f"{one.ratio:.2f}"
        if one.ratio is not None:
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=shades(norm(one.ratio)), edgecolor="white"))
        elif said:
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="0.92", edgecolor="white"))
        dark = one.ratio is not None and norm(one.ratio) < 0.45
        weight = "bold" if one.ratio is not None and one.ratio > 1 else "normal"
        axes.text(
            *place, said, ha="center", va="center", fontsize=8, color="white" if dark else "black", weight=weight
        )
    axes.set(xlim=(-0.5, len(devices) - 0.5), ylim=(-0.5, len(batches) - 0.5))
    axes.set_xticks(range(len(devices)), [str(count) for count in devices])
    axes.set_yticks(range(len(batches)), [str(count) for count in batches])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("devices")
    axes.set_ylabel("batch, sequences")
    axes.set_title(f"Best layout with m > 1, times as good as the best other one: {plan.goal}")
    work = plan.work
    words = f"{plan.model} on {plan.hardware}; {work.mode}, length {work.length}, {work.precision}; modelled"
    caption(chart, words)
    return chart


def _points(rows: list[Estimate]) -> tuple[list[float], list[float]]:
    return [one.memory.total / 1e9 for one in rows], [one.tokens_per_s for one in rows]
