"""How long a search takes as the devices grow: measured, as a table and as figures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from helix.config.plan_schema import MODES
from helix.planner import catalogue
from helix.planner.candidates import Asked
from helix.planner.estimate import Estimator
from helix.planner.machine import machine_of
from helix.planner.search import search
from helix.planner.work import Work

MODEL, HARDWARE = "llama3_70b", "dgx_h100"
BATCH, LENGTH, NEW_TOKENS = 1024, 4096, 256  # many divisors, so that there is much to search
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
REPEATS = 5
LIMITS_S = {1024: 1.0, 16_384: 10.0}  # what a search may take


@dataclass(frozen=True)
class Point:
    """One search, repeated.

    Args:
        considered: layouts whose dims are legal.
        runs_s: processor time of each repeat.
    """

    mode: str
    devices: int
    considered: int
    runs_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return median(self.runs_s)


def measure(devices: Sequence[int] = DEVICES, repeats: int = REPEATS) -> list[Point]:
    """Search time of every mode on every number of devices: processor time, which other work slows and does not fill.

    Repeats are rounds over everything, so that a slow minute falls on all of them.
    """
    runs: dict[tuple[str, int], list[float]] = {}
    considered: dict[tuple[str, int], int] = {}
    for _ in range(repeats):
        for key in ((mode, count) for mode in MODES for count in devices):
            spent, considered[key] = _once(*key)
            runs.setdefault(key, []).append(spent)
    return [Point(mode, count, considered[mode, count], tuple(times)) for (mode, count), times in runs.items()]


def _once(mode: str, devices: int) -> tuple[float, int]:
    """Seconds of one search, all of whose costs are computed anew, and how many layouts it went through."""
    work = Work(mode, BATCH, LENGTH, NEW_TOKENS if mode == "generate" else 0)
    shape = catalogue.shape(catalogue.model(MODEL), mode)
    machine = machine_of(catalogue.hardware(HARDWARE), work.precision, devices)
    started = time.process_time()
    found = search(Estimator(shape, machine, work), "throughput", Asked())
    return time.process_time() - started, found.considered


def table(points: Sequence[Point]) -> Table:
    """For people: devices down, modes across."""
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("devices", justify="right")
    for mode in MODES:
        out.add_column(f"{mode}, layouts", justify="right")
        out.add_column("s", justify="right")
    for devices in sorted({one.devices for one in points}):
        own = [one for one in points if one.devices == devices]
        out.add_row(f"{devices:,}", *(word for one in own for word in (f"{one.considered:,}", f"{one.median_s:.2f}")))
    return out


def as_dict(points: Sequence[Point]) -> dict[str, Any]:
    """For JSON."""
    return {
        "model": MODEL,
        "hardware": HARDWARE,
        "batch": BATCH,
        "length": LENGTH,
        "limits_s": LIMITS_S,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "searches": list(_figures(points)),
    }


def _figures(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    for one in points:
        yield {
            "mode": one.mode,
            "devices": one.devices,
            "layouts": one.considered,
            "processor_s": {"runs": one.runs_s, "median": one.median_s, "min": min(one.runs_s)},
        }
