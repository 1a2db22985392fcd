"""Predicted against measured step times."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from helix.config.words import figure
from helix.figures.style import DARK, STYLE, caption, marker, picture, shade


@rc_context(STYLE)
def predictions(content: dict[str, Any]) -> Figure:
    """Each layout a point, by its ranks; on the line a prediction is exact, between the dashes within 20 %.

    Args:
        content: as `python -m helix validate --json` writes it.
    """
    outcomes = content["outcomes"]
    chart = picture(4.4, 4.4)
    axes = chart.subplots()
    times = [one[name] for one in outcomes for name in ("predicted_ms", "measured_ms")]
    ends = [min(times) * 0.8, max(times) * 1.25]
    axes.plot(ends, ends, color=DARK, linewidth=1)
    for off in (0.8, 1.2):
        axes.plot(ends, [end * off for end in ends], color=DARK, linewidth=0.8, linestyle="--")
    ranks = sorted({one["ranks"] for one in outcomes})
    for place, count in enumerate(ranks):
        these = [one for one in outcomes if one["ranks"] == count]
        axes.scatter(
            [one["measured_ms"] for one in these],
            [one["predicted_ms"] for one in these],
            s=22,
            marker=marker(place),
            color=[shade(place, len(ranks))],
            edgecolor="0.2",
            linewidth=0.4,
            label=f"{count} ranks",
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured step, ms", ylabel="predicted step, ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: figure(value))
    axes.set_title(f"Predicted by hardware={content['hardware']}, against measured")
    axes.legend(loc="upper left")
    tau, error = content["kendall_tau"], content["median_error"]
    caption(
        chart,
        f"{len(outcomes)} layouts; Kendall's tau {tau:.2f}, median error {error:.0%}",
        "dashed: 20 % off",
    )
    return chart
