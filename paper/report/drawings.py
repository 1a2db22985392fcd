"""The report's figures: name -> a function that draws it from stored results, by `helix.figures`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from helix.figures import exchange, growth, maps, ownership, predictions, style
from helix.figures.traffic import bytes_of
from helix.partition.cost import AttentionCost
from helix.partition.grid import Grid, HeadLayout
from helix.planner.catalogue import model
from paper.report.measured import traffic
from paper.report.sources import Sources

DRAWN: dict[str, Callable[[Sources], Figure]] = {}
# Results that a figure is made of, for the digest; a figure of none is a drawing of definitions.
MADE_OF = {
    "ownership": (),
    "exchange": (),
    "schedules": ("bench_core256", "bench_core1024", "bench_core2048", "bench_core4096"),
    "growth": ("long_context_sweep", "long_context_baselines"),
    "traffic": ("baselines_dense", "outside_peers_dense"),
    "predictions": ("validate",),
    "map": ("plan_map_generate",),
}


def _drawn(name: str) -> Callable[[Callable[[Sources], Figure]], Callable[[Sources], Figure]]:
    def note(draw: Callable[[Sources], Figure]) -> Callable[[Sources], Figure]:
        DRAWN[name] = draw
        return draw

    return note


def _in_column(chart: Figure, height: float) -> Figure:
    """A figure made for a whole page's width laid out anew for a column, in letters of the same size.

    Its title and what it says of its data are in the report's caption.
    """
    chart.set_size_inches(style.COLUMN, height)
    for axes in chart.axes:
        axes.set_title("", loc="left")
    chart.supxlabel("")
    return chart


@_drawn("ownership")
def _ownership(sources: Sources) -> Figure:
    return ownership.ownership(Grid(m=2, n=2), heads=4, kv_heads=2)


@_drawn("exchange")
def _exchange(sources: Sources) -> Figure:
    return exchange.exchange(2, ("batch", "rows", "gather"))


@_drawn("schedules")
@rc_context(style.STYLE)
def _schedules(sources: Sources) -> Figure:
    """Speed as a multiple of `perslice`'s, by the shape of the work."""
    benches = [sources.json(name) for name in MADE_OF["schedules"]]
    chart = style.picture(style.COLUMN, 2.7)
    axes = chart.subplots()
    for schedule, look in style.SCHEDULES.items():
        ran = [(place, bench["speed_ratio"]["perslice"].get(schedule)) for place, bench in enumerate(benches)]
        found = [(place, each["ratio"], *each["ci95"]) for place, each in ran if each]
        if found:
            at, ratio, low, high = map(np.array, zip(*found, strict=True))
            axes.errorbar(at, ratio, yerr=[ratio - low, high - ratio], label=schedule, **look)
    axes.axhline(1, color=style.DARK, linewidth=0.8)
    axes.annotate("perslice", (len(benches) - 1, 1), (0, -3), textcoords="offset points", ha="right", va="top")
    axes.set_xticks(range(len(benches)), [f"{_samples(bench)} x {_length(bench):,}" for bench in benches])
    axes.set(yscale="log", xlabel="samples x tokens", ylabel="speed, multiple of perslice's")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 1.5]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return chart


def _samples(bench: dict[str, Any]) -> int:
    return int(bench["settings"]["batch"])


def _length(bench: dict[str, Any]) -> int:
    return int(bench["settings"]["length"])


@_drawn("growth")
def _growth(sources: Sources) -> Figure:
    """Bytes inside attention: those of a schedule less those of `perslice`, which moves none there."""
    frame = _sent(sources)
    inside = frame.sub(frame["perslice"], axis=0).drop(columns="perslice")
    points = inside.rename_axis(index="x").reset_index().melt(id_vars="x", var_name="schedule", value_name="bytes")
    closed = [_closed(sources, *each) for each in zip(points["schedule"], points["x"], strict=True)]
    return growth.bytes_inside(points, points.assign(bytes=closed), wide=style.COLUMN)


def _sent(sources: Sources) -> pd.DataFrame:
    """Bytes that left a rank in a step, as counted: a row a length, a column a schedule."""
    own = sources.table("long_context_sweep")[["seq_len", "schedule", "sent_bytes"]]
    others = sources.table("long_context_baselines")[["label", "baseline", "sent_bytes"]]
    others = others.assign(
        seq_len=others["label"].str.rpartition("=")[2].astype(int), schedule=others["baseline"].str.rpartition("_")[2]
    )
    rows = pd.concat([own, others[["seq_len", "schedule", "sent_bytes"]]])
    return rows.pivot(index="seq_len", columns="schedule", values="sent_bytes")


def _closed(sources: Sources, schedule: str, length: int) -> int:
    """By the closed form, of the busiest rank of the one layer."""
    run = sources.table("long_context_sweep").iloc[0]
    dims = model(str(run["model"]))
    layout, grid = (
        HeadLayout(int(dims.heads), int(dims.kv_heads or dims.heads), int(dims.head_dim or 0)),
        Grid(run["m"], run["n"]),
    )
    cost = AttentionCost(layout, grid, schedule, int(run["batch_size"]), length, causal=True, itemsize=4)
    return max(sum(cost.bytes(rank).values()) for rank in range(grid.m))


@_drawn("traffic")
def _traffic(sources: Sources) -> Figure:
    return bytes_of(traffic(sources))


@_drawn("predictions")
def _predictions(sources: Sources) -> Figure:
    return _in_column(predictions.predictions(sources.json("validate")), 3.1)


@_drawn("map")
def _map(sources: Sources) -> Figure:
    chart = maps.winning_map(sources.json("plan_map_generate")["map"])
    chart.suptitle("")
    chart.supxlabel("")
    chart.set_size_inches(style.TEXT, 4.2)
    return chart
