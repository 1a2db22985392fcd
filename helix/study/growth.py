"""How bytes, time and error of each schedule grow with the sequence or with the slices: a picture of a sweep.

Points are measured. Lines are closed forms: of the bytes exactly, of the time as a sum of FLOPs, bytes, attention
scores that are written to memory (`gather` and `score` have no fused kernel) and a constant, whose four factors are
one fit to all points of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from scipy import optimize

from helix.command.sweep import SweepJob, report_of
from helix.config.methods import from_name
from helix.config.schema import ITEMSIZE, PRETRAINED, InferConfig, expert_parallel, to_options, to_shape
from helix.figures import growth as drawing
from helix.figures.style import save
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.schedules import refusal
from helix.partition.transformer_cost import TransformerCost

if TYPE_CHECKING:
    import pandas as pd

MEASURED, CLOSED = "measured", "closed form"  # kinds of rows of a growth.csv
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
    """Write growth.csv and growth.png, if the jobs measured several schedules over several lengths, or over several m.

    Returns:
        the files, or none; of generation, whose prompts have lengths of their own, nothing.
    """
    jobs = [job for job in jobs if isinstance(job.settings, InferConfig) and job.settings.model.kind != PRETRAINED]
    for name, of in (("L, tokens of one sequence", _length), ("m, feature slices (ranks of a head group)", _slices)):
        points = list(_points(jobs, of))
        schedules, xs = {point.schedule for point in points}, {point.x for point in points}
        if len(schedules) > 1 and len(xs) > 1 and _is_one_line_each(points):
            figures, about = table(points, name), _provenance(points)
            figures.to_csv(folder / "growth.csv", index=False)
            return [folder / "growth.csv", save(growth(figures, about), folder / "growth.png")]
    return []


def table(points: Sequence[Point], name: str) -> pd.DataFrame:
    """All that the picture shows, so that it can be drawn again without the runs.

    Args:
        name: of x.

    Returns:
        columns `kind`, `x_name`, `schedule`, `x`, `bytes`, `step_ms`, `low`, `high` and `error`. Rows of the kind
        `measured` are the points; those of the kind `closed form` are the lines, which have no interval or error.
    """
    import pandas as pd

    predict, xs = _fit(points), sorted({point.x for point in points})
    names = ("schedule", "x", "bytes", "step_ms", "low", "high", "error")
    rows = [{"kind": MEASURED} | {key: getattr(point, key) for key in names} for point in points]
    for schedule in dict.fromkeys(point.schedule for point in points):
        own = sorted((point for point in points if point.schedule == schedule), key=lambda point: point.x)
        for x, cost in _curve(own, xs):
            found = {"schedule": schedule, "x": x, "bytes": _inside(cost), "step_ms": predict(cost)}
            rows.append({"kind": CLOSED} | found)
    return pd.DataFrame(rows).assign(x_name=name)[["kind", "x_name", *names]]


def growth(figures: pd.DataFrame, about: str = "") -> Figure:
    """The picture of a `table`, or of a growth.csv.

    Args:
        about: where the figures come from.
    """
    points, lines = (figures[figures["kind"] == kind] for kind in (MEASURED, CLOSED))
    return drawing.growth(points, lines, str(figures["x_name"].iloc[0]), about)


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
