"""Pictures of training: a run's own curves, and a sweep's settings beside each other over their seeds.

Colours are those of Okabe and Ito, for every kind of colour vision; in grey the settings differ by their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from helix.study.plots import STYLE, caption, days, machine
from helix.training.compare import Curve, Setting, band, curve, loss_gaps, together

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": (0, (5, 1.5))},
    {"color": "#009E73", "linestyle": (0, (4, 1, 1, 1))},
    {"color": "#CC79A7", "linestyle": (0, (1.5, 1))},
    {"color": "#E69F00", "linestyle": (0, (8, 2))},
    {"color": "#56B4E9", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
    {"color": "black", "linestyle": (0, (1, 2))},
)
_GREY = "0.35"
# Settings whose losses stay this near to the reference's, in nats, compute the same function: their distance is drawn
# on a logarithmic axis.
_SAME = 1e-2
_NOTHING = 1e-8  # where a distance of 0 is drawn
_SMOOTHED = 40  # parts of a training over each of which a loss is averaged


@rc_context(STYLE)
def draw_run(report: dict[str, Any]) -> Figure:
    """A run's losses and validations; beside them learning rate, and norm and loss scale where they were recorded.

    Args:
        report: content of train_report.json.
    """
    beside = [draw for key, draw in _BESIDE.items() if any(value is not None for value in report[key])]
    chart = Figure(figsize=(10.5, 4.6), layout="constrained")
    grid = chart.add_gridspec(len(beside), 2, width_ratios=(1.9, 1))
    main = chart.add_subplot(grid[:, 0])
    _draw_losses(main, report)
    for row, draw in enumerate(beside):
        axes = chart.add_subplot(grid[row, 1], sharex=main)
        draw(axes, report)
        axes.tick_params(labelbottom=row == len(beside) - 1)
    main.set_xlabel("optimizer step")
    chart.axes[-1].set_xlabel("optimizer step")
    for axes in chart.axes:
        _lines(axes)
    method, schedule = report["method"]["name"], report["method"]["schedule"]["prefill"]
    named = schedule and not method.endswith(schedule)
    chart.suptitle(f"{method}, schedule {schedule}" if named else method, x=0.01, ha="left", fontsize=11)
    caption(chart, *_provenance([report]), f"seed {report['seed']}")
    return chart


@rc_context(STYLE)
def draw_settings(settings: Sequence[Setting]) -> Figure:
    """Training loss and validation of each setting; and, where something is compared, its distance to the reference.

    A thin line is a seed; the thick one the mean of all, and the band its 95 % t-interval.

    Args:
        settings: of a sweep, some of them with reports.
    """
    drawn = [setting for setting in settings if setting.reports]
    compared = any(setting.pairs for setting in drawn)
    rows = math.ceil(len(drawn) / 4)
    chart = Figure(figsize=(13 if compared else 9, 4.5 + 0.2 * rows), layout="constrained")
    panels = chart.subplots(1, 3 if compared else 2)
    looks = _looks(drawn)
    for setting, look in zip(drawn, looks, strict=True):
        reports = list(setting.reports.values())
        _draw_seeds(panels[0], [_smooth(report) for report in reports], look, setting.label)
        _draw_seeds(panels[1], [_validations(report) for report in reports], look)
    steps = max(len(report["losses"]) for setting in drawn for report in setting.reports.values())
    panels[0].set_title(f"Training loss, bits per byte{_over(steps)}")
    panels[1].set_title("Validation, bits per byte")
    if compared:
        _draw_distance(panels[2], drawn, looks)
    for axes in panels:
        axes.set_xlabel("optimizer step")
        _lines(axes)
        _limit(axes)
    handles, names = panels[0].get_legend_handles_labels()
    chart.legend(handles, names, loc="outside upper left", ncols=min(4, len(drawn)), frameon=False, handlelength=3.2)
    seeds = sorted({seed for setting in drawn for seed in setting.reports})
    over = (
        f"{len(seeds)} seeds; thick: their mean, band: its 95\u00a0% t-interval"
        if len(seeds) > 1
        else f"seed {seeds[0]}"
    )
    caption(chart, *_provenance([report for setting in drawn for report in setting.reports.values()]), over)
    return chart


def _looks(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """A colour for each of those that are compared; where there are several references, dashes for each one's."""
    groups: dict[str, list[str]] = {}
    for setting in settings:
        groups.setdefault((setting.reference or setting).label, []).append(setting.label)
    looks = {}
    for group, members in enumerate(groups.values()):
        for place, label in enumerate(members):
            looks[label] = dict(LOOKS[place % len(LOOKS)])
            if len(groups) > 1:
                looks[label]["linestyle"] = LOOKS[group % len(LOOKS)]["linestyle"]
    return [looks[setting.label] for setting in settings]


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    raw = curve(report["losses"]) / math.log(2)
    axes.plot(np.arange(1, len(raw) + 1), raw, color=LOOKS[0]["color"], alpha=0.3, linewidth=0.8)
    at, smooth = _smooth(report)
    axes.plot(at, smooth, color=LOOKS[0]["color"], linewidth=1.6, label=f"training{_over(len(raw))}")
    at, bits = _validations(report)
    axes.plot(at, bits, color=LOOKS[1]["color"], marker="o", markersize=4.5, linewidth=1.2, label="validation")
    entropy = report["unigram_entropy_bpb"]
    axes.axhline(entropy, color=_GREY, linewidth=0.9, linestyle="--", label="unigram entropy of the text")
    axes.set_title("Loss, bits per byte")
    axes.legend(loc="upper right", frameon=False)


def _draw_rate(axes: Axes, report: dict[str, Any]) -> None:
    _draw_steps(axes, curve(report["learning_rates"]))
    axes.set_ylim(bottom=0)
    axes.set_title("Learning rate")


def _draw_norm(axes: Axes, report: dict[str, Any]) -> None:
    _draw_steps(axes, curve(report["gradient_norms"]))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    limit = report["trainer"]["gradient_clip_val"]
    clipped = ""
    if limit is not None:
        axes.axhline(limit, color=_GREY, linewidth=0.9, linestyle="--")
        clipped = f"; clipped above {limit:g} (dashed)"
    axes.set_title(f"Gradient norm{clipped}")


def _draw_scale(axes: Axes, report: dict[str, Any]) -> None:
    scales = curve(report["loss_scales"])
    _draw_steps(axes, scales)
    skipped = [step for step in report["skipped_steps"] if step <= len(scales)]
    axes.plot(skipped, scales[np.array(skipped, dtype=int) - 1], "x", color=LOOKS[1]["color"])
    axes.set_yscale("log", base=2)
    axes.set_title(f"Loss scale; skipped steps: {len(skipped)}" + (" (crosses)" if skipped else ""))


def _draw_steps(axes: Axes, values: Curve) -> None:
    axes.plot(np.arange(1, len(values) + 1), values, color=LOOKS[0]["color"], linewidth=1.1)


# By the key of the report that holds what they draw.
_BESIDE: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
    "learning_rates": _draw_rate,
    "gradient_norms": _draw_norm,
    "loss_scales": _draw_scale,
}


def _draw_seeds(axes: Axes, curves: Sequence[tuple[Curve, Curve]], look: dict[str, Any], label: str = "") -> None:
    """Each seed thin, their mean thick and its interval as a band; one seed alone as a line."""
    at = min((steps for steps, _ in curves), key=len)
    values = together([found for _, found in curves])
    if len(values) == 1:
        axes.plot(at, values[0], linewidth=1.6, label=label, **look)
        return
    for each in values:
        axes.plot(at, each, color=look["color"], linewidth=0.6, alpha=0.45)
    mean, low, high = band(values)
    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(at, mean, linewidth=1.8, label=label, **look)


def _draw_distance(axes: Axes, settings: Sequence[Setting], looks: Sequence[dict[str, Any]]) -> None:
    """How far each setting is from its reference: the validation; or the loss, where that is within rounding."""
    pairs = [(setting, look) for setting, look in zip(settings, looks, strict=True) if setting.pairs]
    gaps = {setting.label: found for setting, _ in pairs if (found := loss_gaps(setting)) is not None}
    names = list(dict.fromkeys(setting.reference.label for setting, _ in pairs if setting.reference is not None))
    name = names[0] if len(names) == 1 else "the reference"
    if max(float(np.nanmax(found)) for found in gaps.values()) < _SAME:
        for setting, look in pairs:
            found = np.maximum.accumulate(gaps[setting.label].max(0))
            axes.plot(np.arange(1, len(found) + 1), np.maximum(found, _NOTHING), linewidth=1.2, **look)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.set_title(f"Training loss: largest distance so far\nto that of {name}, nats a token", fontsize=10)
        return
    for setting, look in pairs:
        _draw_seeds(axes, [_minus(*pair) for pair in setting.pairs], look)
    axes.axhline(0, color=_GREY, linewidth=0.9)
    axes.set_title(f"Validation above {name}'s, bits per byte")


def _minus(own: dict[str, Any], other: dict[str, Any]) -> tuple[Curve, Curve]:
    """The difference of the validations that both made."""
    values, others = (dict(zip(*_validations(report), strict=True)) for report in (own, other))
    both = [step for step in values if step in others]
    return np.array(both), np.array([values[step] - others[step] for step in both])


def _smooth(report: dict[str, Any]) -> tuple[Curve, Curve]:
    """Steps, and the mean training loss of those up to there, in bits per byte; as many as `_over` says."""
    values = curve(report["losses"]) / math.log(2)
    width = _width(len(values))
    mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(width, len(values) + 1, dtype=np.float64), mean


def _width(steps: int) -> int:
    return max(1, round(steps / _SMOOTHED))


def _over(steps: int) -> str:
    return f" (mean of {_width(steps)} steps)" if _width(steps) > 1 else ""


def _validations(report: dict[str, Any]) -> tuple[Curve, Curve]:
    found = report["validations"]
    return curve([each["step"] for each in found]), curve([each["bpb"] for each in found])


def _lines(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)


def _limit(axes: Axes) -> None:
    """Leave to the bands half the height of the lines: over two seeds they are as wide as the whole loss."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines])
    low, high = np.nanmin(values), np.nanmax(values)
    bottom, top = axes.get_ylim()
    if low < high:
        axes.set_ylim(max(bottom, low - (high - low) / 2), min(top, high + (high - low) / 2))


def _provenance(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    models = {each["model"]["name"]: each["parameters"] / 1e6 for each in reports}
    yield "model " + ", ".join(f"{name} ({millions:.2g} M parameters)" for name, millions in models.items())
    sizes = dict.fromkeys(
        f"{each['data']['batch_size'] * each['trainer']['accumulate_grad_batches']} x {each['data']['seq_len']}"
        for each in reports
    )
    yield f"steps of {', '.join(sizes)} tokens of {', '.join(dict.fromkeys(each['text'] for each in reports))}"
    yield ", ".join(dict.fromkeys(each["precision"] for each in reports))
    yield machine(each["world_size"] for each in reports)
    yield days(each["started_at"] for each in reports)
    yield ", ".join(dict.fromkeys(f"commit {each['git_commit'][:7]}" for each in reports if each["git_commit"]))
