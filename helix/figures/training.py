"""A training's own curves: its losses and validations, and what its optimizer did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from helix.figures.style import DARK, STYLE, TEXT, caption, look, picture

Curve: TypeAlias = NDArray[np.float64]

_SMOOTHED = 40  # parts of a training over each of which a loss is averaged
_FIRST, _SECOND = look(0)["color"], look(4)["color"]


@rc_context(STYLE)
def run(report: dict[str, Any], *about: str) -> Figure:
    """A run's losses and validations; beside them learning rate, and norm and loss scale where they were recorded.

    Args:
        report: content of train_report.json.
        about: where it comes from, in parts.
    """
    beside = [draw for key, draw in _BESIDE.items() if any(value is not None for value in report[key])]
    chart = picture(TEXT, max(2.9, 1.45 * len(beside)))
    grid = chart.add_gridspec(len(beside), 2, width_ratios=(1.7, 1))
    main = chart.add_subplot(grid[:, 0])
    _draw_losses(main, report)
    for row, draw in enumerate(beside):
        axes = chart.add_subplot(grid[row, 1], sharex=main)
        draw(axes, report)
        axes.tick_params(labelbottom=row == len(beside) - 1)
    main.set_xlabel("optimizer step")
    chart.axes[-1].set_xlabel("optimizer step")
    for axes in chart.axes:
        lines(axes)
    method, schedule = report["method"]["name"], report["method"]["schedule"]["prefill"]
    named = schedule and not method.endswith(schedule)
    chart.suptitle(f"{method}, schedule {schedule}" if named else method, x=0.01, ha="left", fontsize=9)
    caption(chart, *about, f"seed {report['seed']}")
    return chart


def numbers(values: Sequence[float | None]) -> Curve:
    """Figures of a report; null, which stands for what is not finite, becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def smooth(losses: Sequence[float | None]) -> tuple[Curve, Curve]:
    """Steps, and the mean loss of those up to there in bits per byte, each of as many as `width` says.

    Args:
        losses: of every step, in nats per byte.
    """
    values = numbers(losses) / math.log(2)
    many = width(len(values))
    mean = np.convolve(values, np.full(many, 1 / many), mode="valid")
    return np.arange(many, len(values) + 1, dtype=np.float64), mean


def width(steps: int) -> int:
    """How many steps a drawn loss is the mean of."""
    return max(1, round(steps / _SMOOTHED))


def validations(report: dict[str, Any]) -> tuple[Curve, Curve]:
    """Steps, and the validation after them in bits per byte."""
    found = report["validations"]
    return numbers([each["step"] for each in found]), numbers([each["bpb"] for each in found])


def lines(axes: Axes) -> None:
    """A grid, and whole steps."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid()


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    raw = numbers(report["losses"]) / math.log(2)
    axes.plot(np.arange(1, len(raw) + 1), raw, color=_FIRST, alpha=0.35, linewidth=0.6)
    at, mean = smooth(report["losses"])
    many = f" (mean of {width(len(raw))} steps)" if width(len(raw)) > 1 else ""
    axes.plot(at, mean, color=_FIRST, label=f"training{many}")
    axes.plot(*validations(report), color=_SECOND, marker="o", linewidth=1.0, label="validation")
    entropy = report["unigram_entropy_bpb"]
    axes.axhline(entropy, color=DARK, linewidth=0.9, linestyle="--", label="unigram entropy of the text")
    axes.set_title("Loss, bits per byte")
    axes.legend(loc="upper right")


def _draw_rate(axes: Axes, report: dict[str, Any]) -> None:
    _draw_steps(axes, numbers(report["learning_rates"]))
    axes.set_ylim(bottom=0)
    axes.set_title("Learning rate")


def _draw_norm(axes: Axes, report: dict[str, Any]) -> None:
    _draw_steps(axes, numbers(report["gradient_norms"]))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    limit = report["trainer"]["gradient_clip_val"]
    clipped = ""
    if limit is not None:
        axes.axhline(limit, color=DARK, linewidth=0.9, linestyle="--")
        clipped = f"\nclipped above {limit:g} (dashed)"
    axes.set_title(f"Gradient norm{clipped}")


def _draw_scale(axes: Axes, report: dict[str, Any]) -> None:
    scales = numbers(report["loss_scales"])
    _draw_steps(axes, scales)
    skipped = [step for step in report["skipped_steps"] if step <= len(scales)]
    axes.plot(skipped, scales[np.array(skipped, dtype=int) - 1], "x", color=_SECOND)
    axes.set_yscale("log", base=2)
    axes.set_title(f"Loss scale\nskipped steps: {len(skipped)}" + (" (crosses)" if skipped else ""))


def _draw_steps(axes: Axes, values: Curve) -> None:
    axes.plot(np.arange(1, len(values) + 1), values, color=_FIRST, linewidth=1.0)


# By the key of the report that holds what they draw.
_BESIDE: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
    "learning_rates": _draw_rate,
    "gradient_norms": _draw_norm,
    "loss_scales": _draw_scale,
}
