"""Predicted against measured step times, as a picture."""

from __future__ import annotations

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from helix.calibration.outcomes import Validation
from helix.study.plots import MAP, STYLE, caption

MARKS = "osD^vPX"


def chart(found: Validation) -> Figure:
    """Each layout a point, by its ranks; on the line a prediction is exact, between the dashes within 20 %."""
    with rc_context(STYLE):
        drawing = Figure(figsize=(6.4, 6.0), layout="constrained")
        axes = drawing.subplots()
        times = [time for one in found.outcomes for time in (one.predicted_ms, one.measured_ms)]
        ends = [min(times) * 0.8, max(times) * 1.25]
        axes.plot(ends, ends, color="0.35", linewidth=1)
        for off in (0.8, 1.2):
            axes.plot(ends, [end * off for end in ends], color="0.35", linewidth=0.8, linestyle="--")
        ranks = sorted({one.ranks for one in found.outcomes})
        for place, count in enumerate(ranks):
            these = [one for one in found.outcomes if one.ranks == count]
            axes.scatter(
                [one.measured_ms for one in these],
                [one.predicted_ms for one in these],
                s=28,
                marker=MARKS[place % len(MARKS)],
                color=colormaps[MAP](place / max(1, len(ranks) - 1) * 0.85),
                edgecolor="0.2",
                linewidth=0.4,
                label=f"{count} ranks",
            )
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured step, ms")
        axes.set_ylabel("predicted step, ms")
        axes.set_title(f"Predicted by hardware={found.hardware}, against measured")
        axes.legend(frameon=False, loc="upper left")
        caption(
            drawing,
            f"{len(found.outcomes)} layouts; Kendall's tau {found.tau:.2f}, median error {found.error:.0%}",
            "dashed: 20 % off",
        )
    return drawing
