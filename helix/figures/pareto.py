"""What there is to choose between: the layouts of a plan by speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from helix.config.words import figure
from helix.figures.style import STYLE, TEXT, caption, legend, marker, picture, shade
from helix.planner.layout import Layout
from helix.planner.search import kind


@rc_context(STYLE)
def pareto(plan: dict[str, Any]) -> Figure:
    """Tokens/s over memory of a device: layouts that nothing beats, on a line, and the best of each method.

    Args:
        plan: as `python -m helix plan --json` writes it.
    """
    rivals = plan["rivals"]
    chart = picture(TEXT, 3.4 + 0.19 * ((len(rivals) + 2) // 2))
    axes = chart.subplots()
    front = sorted(plan["pareto"], key=lambda one: (one["memory_bytes"]["total"], -one["tokens_per_s"]))
    axes.plot(*_points(_rising(front)), color="0.75", linewidth=1, zorder=1, drawstyle="steps-post")
    label = "nothing beats these in speed, latency and memory at once"
    axes.scatter(*_points(front), s=12, color="0.5", zorder=1, label=label)
    for place, one in enumerate(rivals):
        name = f"{kind(Layout(**one['layout']))}: {one['name']}"
        axes.scatter(
            *_points([one]), s=45, color=[shade(place, len(rivals))], edgecolor="0.2", linewidth=0.5,
            marker=marker(place), zorder=2, label=name,
        )  # fmt: skip
    shown = [*front, *rivals]  # with room for a marker that lies on an edge
    axes.set_ylim(0, 1.08 * max(one["tokens_per_s"] for one in shown))
    axes.set_xlim(0, 1.05 * max(one["memory_bytes"]["total"] for one in shown) / 1e9)
    axes.set_xlabel("memory of the fullest device, GB")
    axes.set_ylabel("tokens/s, modelled")
    axes.yaxis.set_major_formatter(lambda value, _: figure(value))
    axes.grid()
    axes.set_title(f"Layouts of {plan['model']} on {plan['devices']} devices of {plan['hardware']}")
    legend(chart, axes.get_legend_handles_labels()[0], 2)
    work, band = plan["work"], plan["assumptions"][0]
    caption(
        chart, f"{work['mode']}, batch {work['batch']} x {work['length']}, {work['precision']}", band.split(":")[0]
    )
    return chart


def _rising(front: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of layouts by their memory, those that are faster than all that need less."""
    out: list[dict[str, Any]] = []
    for one in front:
        if not out or one["tokens_per_s"] > out[-1]["tokens_per_s"]:
            out.append(one)
    return out


def _points(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [one["memory_bytes"]["total"] / 1e9 for one in rows], [one["tokens_per_s"] for one in rows]
