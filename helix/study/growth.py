"""How bytes, time and error of each schedule grow with the sequence or with the slices: a picture of a sweep.

Points are measured. Lines are closed forms: of the bytes exactly, of the time as a sum of FLOPs, bytes, attention
scores that are written to memory (`gather` and `score` have no fused kernel) and a constant, whose four factors are
one fit to all points of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from scipy import optimize

from helix.command.sweep import SweepJob, report_of
from helix.config.methods import from_name
from helix.config.schema import ITEMSIZE, PRETRAINED, InferConfig, expert_parallel, to_options, to_shape
from helix.config.words import figure, size
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.schedules import SCHEDULES, refusal
from helix.partition.transformer_cost import TransformerCost
from helix.study.plots import STYLE, save

# Distinct in grey too: by marker and by dash. Colours are those of Okabe and Ito, for every kind of colour vision.
LOOKS: dict[str, dict[str, Any]] = {
    "batch": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "heads": {"color": "#56B4E9", "marker": "s", "linestyle": (0, (6, 2))},
    "rows": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "gather": {"color": "#E69F00", "marker": "D", "linestyle": (0, (4, 1, 1, 1))},
    "score": {"color": "#D55E00", "marker": "v", "linestyle": (0, (3, 1))},
    "perslice": {"color": "black", "marker": "x", "linestyle": ":"},
}
_INSIDE = ("enter", "leave")  # ends of the names of what the residual stream moves, the same in every schedule


@dataclass(frozen=True)
class Point:
    """One schedule in one job.

    Args:
        x: the sequence's length, or the number of slices.
        cost: closed forms of this job.
        bytes: that left the busiest rank inside attention in one step, as counted.
        step_ms, low, high: mean over runs and 95 % interval.
        error: relative error to the attention with h heads.
    """

    schedule: str
    x: int
    cost: TransformerCost
    bytes: int
    step_ms: float
    low: float
    high: float
    error: float


def draw_growth(jobs: Sequence[SweepJob], folder: Path) -> list[Path]:
    """Write growth.png, if the jobs measured several schedules over several lengths, or over several m.

    Returns:
        the file, or nothing; of generation, whose prompts have lengths of their own, nothing.
    """
    jobs = [job for job in jobs if isinstance(job.settings, InferConfig) and job.settings.model.kind != PRETRAINED]
    for name, of in (("L, tokens of one sequence", _length), ("m, feature slices (ranks of a head group)", _slices)):
        points = list(_points(jobs, of))
        schedules, xs = {point.schedule for point in points}, {point.x for point in points}
        if len(schedules) > 1 and len(xs) > 1 and _is_one_line_each(points):
            return [save(growth(points, name), folder / "growth.png")]
    return []


@rc_context(STYLE)
def growth(points: Sequence[Point], name: str) -> Figure:
    """Three panels over x, both axes logarithmic: bytes inside attention, time of a step, error.

    Args:
        name: of x.
    """
    chart = Figure(figsize=(11.5, 4.4), layout="constrained")
    panels = chart.subplots(1, 3)
    xs = sorted({point.x for point in points})
    predict = _fit(points)
    for schedule in (each for each in SCHEDULES if any(point.schedule == each for point in points)):
        own = sorted((point for point in points if point.schedule == schedule), key=lambda point: point.x)
        look, at = LOOKS[schedule], [point.x for point in own]
        marks = look | {"linestyle": "none", "markersize": 6, "label": schedule}
        curve = list(_curve(own, xs))
        line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.2}
        if any(point.bytes for point in own):
            panels[0].plot(at, [point.bytes for point in own], **marks)
            panels[0].plot([x for x, _ in curve], [_inside(cost) for _, cost in curve], **line)
        spread = [[point.step_ms - point.low for point in own], [point.high - point.step_ms for point in own]]
        panels[1].errorbar(at, [point.step_ms for point in own], yerr=spread, capsize=2, elinewidth=1, **marks)
        panels[1].plot([x for x, _ in curve], [predict(cost) for _, cost in curve], **line)
        panels[2].plot(at, [point.error for point in own], **(marks | {"linestyle": look["linestyle"]}))
    _label(panels, xs, name)
    chart.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    chart.supxlabel(_provenance(points), fontsize=7.5, color="0.35", x=0.01, ha="left")
    return chart


def _label(panels: Sequence[Axes], xs: Sequence[int], name: str) -> None:
    titles = ("Bytes that leave a rank inside attention", "Time of a step, ms", "Relative error to h-head attention")
    formats: tuple[Callable[[float], str], ...] = (
        lambda value: size(round(value)),
        figure,
        lambda value: f"$10^{{{round(np.log10(value))}}}$",
    )
    for axes, title, text in zip(panels, titles, formats, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(xs)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.yaxis.set_major_formatter(_formatter(text))
        axes.set_xlabel(name)
        axes.grid(color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[2].set_ylim(1e-8, 3)


def _formatter(text: Callable[[float], str]) -> Callable[[float, float], str]:
    """As matplotlib calls it, with a place that does not matter here."""
    return lambda value, place: text(value)


def _provenance(points: Sequence[Point]) -> str:
    cost = points[0].cost
    grids = " .. ".join(dict.fromkeys([points[0].cost.grid.name, points[-1].cost.grid.name]))
    lengths = sorted({point.cost.length for point in points})
    spread = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} .. {lengths[-1]}"
    heads = f"{cost.shape.heads} heads of {cost.shape.head_dim}"
    return (
        f"{grids}; {heads}, {cost.shape.layers} layer(s), batch {cost.batch}, length {spread}. Points: measured, 95 % "
        "intervals. Lines: closed forms; of time a x FLOPs + b x bytes + c x scores written + d, one fit."
    )


def _points(jobs: Sequence[SweepJob], x: Callable[[TransformerCost], int]) -> Iterator[Point]:
    for job in jobs:
        assert isinstance(job.settings, InferConfig)  # training has no sweep over its growth
        report = report_of(job.folder, job.settings)
        for each in [report, *report["baselines"]] if report else []:
            if "error" in each or not each["method"]["name"].startswith("helix_"):
                continue
            cost, accuracy = _cost(job.settings, each["method"]), each["accuracy"]
            executed = each["comm_bytes_per_rank_per_step"]["executed"]
            yield Point(
                schedule=each["method"]["schedule"]["prefill"],
                x=x(cost),
                cost=cost,
                bytes=sum(count for key, count in executed.items() if _is_inside(key)),
                step_ms=each["step_ms"]["mean"],
                low=each["step_ms"]["ci95"][0],
                high=each["step_ms"]["ci95"][1],
                error=accuracy.get("relative_error_to_h_heads", accuracy["relative_error"]),
            )


def _is_one_line_each(points: Sequence[Point]) -> bool:
    """Whether nothing but x and the schedule varies."""
    same = {
        (
            replace(point.cost, length=0, grid=Grid(1, point.cost.grid.n), options=AttentionOptions(), ep_size=1),
            replace(point.cost.options, schedule=""),
        )
        for point in points
    }
    lengths, slices = {point.cost.length for point in points}, {point.cost.grid.m for point in points}
    return len(same) == 1 and min(len(lengths), len(slices)) == 1


def _cost(settings: InferConfig, method: dict[str, Any]) -> TransformerCost:
    """Closed forms of a job's method; baselines have the main one's options."""
    layout, main = from_name(method["name"]), settings.parallel
    options = to_options(main, method["schedule"]["prefill"])
    work, itemsize = settings.workload, ITEMSIZE[settings.precision]
    ep_size = expert_parallel(settings.model, layout)
    grid, batch = Grid(method["m"], method["n"]), work.batch_size // method["data"]
    return TransformerCost(to_shape(settings.model), grid, options, batch, work.seq_len, itemsize, ep_size)


def _length(cost: TransformerCost) -> int:
    return cost.length


def _slices(cost: TransformerCost) -> int:
    return cost.grid.m


def _curve(own: Sequence[Point], xs: Sequence[int]) -> Iterator[tuple[int, TransformerCost]]:
    """The closed forms between the first and the last x: at many lengths, or at the grids that were measured."""
    if own[0].x != own[0].cost.length:
        yield from ((point.x, point.cost) for point in own)
        return
    for length in np.unique(np.geomspace(own[0].x, own[-1].x, 60).round().astype(int)).tolist():
        cost = replace(own[0].cost, length=length)
        if refusal(cost.options.schedule, cost.shape.layout, cost.grid, cost.batch, length) is None:
            yield length, cost


def _is_inside(key: str) -> bool:
    _, _, name = key.partition("/")
    return name.startswith("attention.") and name.split(".")[-1] not in _INSIDE


def _inside(cost: TransformerCost) -> int:
    """Bytes of the busiest rank."""
    slices = range(cost.grid.m)
    return cost.shape.layers * max(sum(cost.attention.bytes(j, cost.shape.qk_norm).values()) for j in slices)


def _fit(points: Sequence[Point]) -> Callable[[TransformerCost], float]:
    """Step time in ms from `_terms`; none of the factors below 0, errors relative."""
    rows = np.array([_terms(point.cost) for point in points])
    times = np.array([point.step_ms for point in points])
    scale = np.maximum(rows.max(0), 1)
    factors, _ = optimize.nnls(rows / scale / times[:, None], np.ones(len(points)))
    return lambda cost: float(np.array(_terms(cost)) / scale @ factors)


def _terms(cost: TransformerCost) -> tuple[float, float, float, float]:
    """FLOPs, bytes moved and scores written by all ranks, which share the machine, and 1."""
    ranks = range(cost.grid.ranks)
    moved = sum(sum(cost.bytes(rank).values()) for rank in ranks)
    written = 0
    if cost.options.schedule in ("gather", "score"):
        heads = cost.shape.layers * cost.batch * cost.shape.heads * cost.grid.m  # each slice has its group's
        written = heads * cost.length**2
    return float(sum(cost.flops(rank) for rank in ranks)), float(moved), float(written), 1.0
