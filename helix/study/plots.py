"""Which pictures a sweep's table has the figures for, and where those come from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from helix.config.environment import gpus
from helix.figures.style import save
from helix.figures.sweep import bars, heat_map

if TYPE_CHECKING:
    import pandas as pd


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
        files.append(save(heat_map(grids, others, about(grids)), folder / f"{name}.png"))
    if (frame["status"] == "done").any():
        files.append(save(bars(frame, about(frame[frame["status"] == "done"])), folder / "bars.png"))
    return files


def about(frame: pd.DataFrame) -> str:
    """Where the figures of a sweep's table come from, on the machine that made them."""
    done = frame[frame["status"] == "done"]
    models = ", ".join(sorted(set(frame["model"])))
    sizes = sorted(set(zip(frame["batch_size"], frame["seq_len"], strict=True)))
    shapes = ", ".join(f"{batch} x {length}" for batch, length in sizes)
    ranks = machine((done if len(done) else frame)["world_size"])
    parts = (f"model {models}", f"batch x length {shapes}", ranks, days(done["started_at"]))
    return "; ".join(part for part in parts if part)


def machine(world_sizes: Iterable[int]) -> str:
    """How many ranks the jobs had, and what of this machine."""
    ranks = sorted(set(world_sizes))
    many = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"{many} ranks on {len(os.sched_getaffinity(0))} cores" + (f" and {gpus()} GPUs" if gpus() else "")


def days(started_at: Iterable[str]) -> str:
    """The first and the last day of jobs that started then."""
    found = sorted({time[:10] for time in started_at})
    return " to ".join(dict.fromkeys([found[0], found[-1]])) if found else ""


def _grids(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows for each heat map: Helix's, by the overrides that differ besides the grid."""
    helix = frame[frame["method"].str.startswith("helix_")]
    for others, grids in helix.groupby("others", sort=False):
        if grids["m"].nunique() > 1 and grids["n"].nunique() > 1:
            yield str(others), grids
