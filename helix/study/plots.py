"""Plots of a sweep: tokens/s over m x n, every job with its interval, and how many times as fast as its baselines.

Drawn on `Figure` objects, without pyplot's global state, so that nothing needs a display or is left behind.
Colours are cividis: they keep their order in grey and for every kind of colour vision.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from helix.config.environment import gpus
from helix.config.words import figure

if TYPE_CHECKING:
    import pandas as pd

MAP = "cividis"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}
MOST_BARS = 40
_GREY, _DARK = "0.92", "0.35"


def draw(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the plots that a sweep's table has the figures for.

    bars.png has every measured job. heatmap.png has Helix's grids, if both m and n vary among them; if other keys
    vary too, each of their combinations has a heat map of its own, heatmap_{combination}.png.

    Args:
        frame: of `helix.study.sweep.table`.
        folder: where they go.

    Returns:
        the files.
    """
    files = []
    for others, grids in _grids(frame):
        name = re.sub(r"[^\w.=-]+", "_", f"heatmap_{others}").strip("_")
        files.append(save(heat_map(grids, others), folder / f"{name}.png"))
    if (frame["status"] == "done").any():
        files.append(save(bars(frame), folder / "bars.png"))
    return files


@rc_context(STYLE)
def heat_map(grids: pd.DataFrame, others: str = "") -> Figure:
    """Tokens/s over m (rows) and n (columns); what was not measured is hatched, with what became of it.

    Args:
        grids: the rows of Helix's grids. Of several jobs with one (m, n) the fastest is shown, and the title says so.
        others: the overrides that these jobs have in common and that other jobs of the sweep have not.
    """
    ms, ns = sorted(set(grids["m"])), sorted(set(grids["n"]))
    chart = Figure(figsize=(2.6 + 1.0 * len(ns), 2.1 + 0.62 * len(ms)), layout="constrained")
    axes = chart.subplots()
    done = grids[grids["status"] == "done"]
    low, high = (done["tokens_per_s"].min(), done["tokens_per_s"].max()) if len(done) else (0.0, 1.0)
    norm, colours = Normalize(low, max(high, low * 1.001)), colormaps[MAP]
    for row, m in enumerate(ms):
        for column, n in enumerate(ns):
            here = grids[(grids["m"] == m) & (grids["n"] == n)]
            fastest = here[here["status"] == "done"]["tokens_per_s"].max()
            if fastest == fastest:  # not NaN: measured
                colour = colours(norm(fastest))
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
                ink = "white" if _luminance(colour) < 0.45 else "black"
                axes.text(column, row, figure(fastest), ha="center", va="center", color=ink)
            else:
                _blank(axes, column, row, here["status"].iloc[0] if len(here) else "")
    axes.set(xlim=(-0.5, len(ns) - 0.5), ylim=(len(ms) - 0.5, -0.5), aspect="auto")
    axes.set_xticks(range(len(ns)), [str(n) for n in ns])
    axes.set_yticks(range(len(ms)), [str(m) for m in ms])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("n, head groups")
    axes.set_ylabel("m, feature slices")
    repeated = done.duplicated(["m", "n"]).any()
    axes.set_title(
        "Tokens/s by grid" + (f"\n{others}" if others else "") + ("\nbest of each cell" if repeated else "")
    )
    if len(done):
        bar = chart.colorbar(
            ScalarMappable(norm, colours), ax=axes, label="tokens/s", pad=0.03, format=lambda value, _: figure(value)
        )
        bar.outline.set_visible(False)
    _caption(chart, grids)
    return chart


@rc_context(STYLE)
def bars(frame: pd.DataFrame) -> Figure:
    """Tokens/s of each measured job with its 95 % interval, the fastest on top; at most `MOST_BARS` of them."""
    done = frame[frame["status"] == "done"].sort_values("tokens_per_s", ascending=False)
    shown = done.head(MOST_BARS)
    chart = Figure(figsize=(8, 1.5 + 0.28 * len(shown)), layout="constrained")
    axes = chart.subplots()
    places = range(len(shown))
    errors = [shown["tokens_per_s"] - shown["tokens_per_s_low"], shown["tokens_per_s_high"] - shown["tokens_per_s"]]
    axes.barh(
        places,
        shown["tokens_per_s"],
        height=0.7,
        color=colormaps[MAP](0.6),
        xerr=[error.to_numpy() for error in errors],
        error_kw={"ecolor": "black", "elinewidth": 1.1, "capsize": 2.5},
    )
    axes.set_yticks(places, list(shown["label"]))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: figure(value))
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("tokens/s, mean and 95 % interval over runs")
    axes.set_title(
        "Tokens/s by method" + (f": the fastest {len(shown)} of {len(done)}" if len(done) > len(shown) else "")
    )
    _caption(chart, done)
    return chart


@rc_context(STYLE)
def ratios(frame: pd.DataFrame, jobs: pd.DataFrame) -> Figure:
    """How many times as fast as a baseline each job's main method is, with its 95 % interval; 1 is a line.

    Args:
        frame: of `helix.study.sweep.comparisons`; a row without a ratio did not run, and says so.
        jobs: of `helix.study.sweep.table`.
    """
    ran = frame[frame["ratio"].notna()]
    chart = Figure(figsize=(8, 1.6 + 0.3 * len(frame)), layout="constrained")
    axes = chart.subplots()
    for place, row in enumerate(frame.itertuples()):
        if row.ratio == row.ratio:  # not NaN: it ran
            clear = row.ratio_low > 1 or row.ratio_high < 1
            face = colormaps[MAP](0.0) if clear else "white"
            axes.plot([row.ratio_low, row.ratio_high], [place, place], color="black", linewidth=1.1)
            axes.plot(row.ratio, place, "o", markersize=6, markerfacecolor=face, markeredgecolor="black")
        else:
            axes.text(1.02, place, f"{row.baseline} did not run", va="center", fontsize=8, color=_DARK)
    axes.axvline(1, color=_DARK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(range(len(frame)), [f"{row.label} / {row.baseline}" for row in frame.itertuples()])
    axes.set_ylim(len(frame) - 0.4, -0.6)
    axes.set_xscale("log")
    if len(ran):
        axes.set_xlim(min(0.9, ran["ratio_low"].min() * 0.93), max(1.1, ran["ratio_high"].max() * 1.07))
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.grid(axis="x", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times as fast as the baseline (95 % interval; filled if without 1)", loc="right")
    axes.set_title("Main method / baseline, taking turns in one launch")
    _caption(chart, jobs)
    return chart


def _grids(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows for each heat map: Helix's, by the overrides that differ besides the grid."""
    helix = frame[frame["method"].str.startswith("helix_")]
    for others, grids in helix.groupby("others", sort=False):
        if grids["m"].nunique() > 1 and grids["n"].nunique() > 1:
            yield str(others), grids


def _blank(axes: Axes, column: int, row: int, status: str) -> None:
    """A cell without a figure. One that the sweep did not ask for stays white."""
    if status:
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_GREY, edgecolor="0.7", hatch="////", linewidth=0)
        )
        box = {"facecolor": _GREY, "edgecolor": "none", "pad": 1.5}
        said = {"skipped": "cannot run", "open": "not run"}.get(status, status)
        axes.text(column, row, said, ha="center", va="center", color=_DARK, fontsize=8, bbox=box)


def _luminance(colour: tuple[float, float, float, float]) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def _caption(chart: Figure, frame: pd.DataFrame) -> None:
    """Where the figures of a sweep's table come from."""
    done = frame[frame["status"] == "done"]
    models = ", ".join(sorted(set(frame["model"])))
    sizes = sorted(set(zip(frame["batch_size"], frame["seq_len"], strict=True)))
    shapes = ", ".join(f"{batch} x {length}" for batch, length in sizes)
    ranks = machine((done if len(done) else frame)["world_size"])
    caption(chart, f"model {models}", f"batch x length {shapes}", ranks, days(done["started_at"]))


def caption(chart: Figure, *parts: str) -> None:
    """Say where a chart's figures come from, small, below."""
    words = "; ".join(part for part in parts if part)
    wide = round(chart.get_figwidth() * 16.5)  # characters of this size
    chart.supxlabel(textwrap.fill(words, wide), fontsize=7.5, color=_DARK, x=0.01, ha="left")


def machine(world_sizes: Iterable[int]) -> str:
    """How many ranks the jobs had, and what of this machine."""
    ranks = sorted(set(world_sizes))
    many = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"{many} ranks on {len(os.sched_getaffinity(0))} cores" + (f" and {gpus()} GPUs" if gpus() else "")


def days(started_at: Iterable[str]) -> str:
    """The first and the last day of jobs that started then."""
    found = sorted({time[:10] for time in started_at})
    return " to ".join(dict.fromkeys([found[0], found[-1]])) if found else ""


def save(chart: Figure, path: Path) -> Path:
    """Write a chart, and return its path."""
    with rc_context(STYLE):  # read when a hatch or a grid is drawn, too
        chart.savefig(path, dpi=150)
    return path
