"""Measured curves: what a calibration found at some points, and what is read between them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from helix.config.hardware import HardwareConfig, MeasuredExchange


@dataclass(frozen=True)
class Curve:
    """Positive values at ascending places: straight between two on logarithmic scales, level beyond both ends.

    Args:
        proportional: whether values grow in proportion beyond the last place, as times do with bytes.
    """

    at: tuple[float, ...]
    values: tuple[float, ...]
    proportional: bool = False

    def __call__(self, place: float) -> float:
        right = bisect_right(self.at, place)
        if right == 0:
            return self.values[0]
        if right == len(self.at):
            return self.values[-1] * (place / self.at[-1] if self.proportional else 1.0)
        low, high = self.at[right - 1], self.at[right]
        part = math.log(place / low) / math.log(high / low)
        return math.exp((1 - part) * math.log(self.values[right - 1]) + part * math.log(self.values[right]))


@dataclass(frozen=True)
class Shares:
    """Parts of the peak that operations reach by their size.

    Args:
        products: of matrix products, by their smallest dim.
        attention: of causal fused attention, by head dim the curves over lengths; ascending.
    """

    products: Curve
    attention: tuple[tuple[int, Curve], ...]

    def attending(self, head_dim: float, length: float) -> float:
        """Of attention with heads of `head_dim` over sequences of `length`."""
        dims = Curve(tuple(dim for dim, _ in self.attention), tuple(curve(length) for _, curve in self.attention))
        return dims(head_dim)


@dataclass(frozen=True)
class Exchanges:
    """Times of collectives, measured in groups of some sizes within jobs of some numbers of ranks."""

    curves: dict[tuple[str, int, int], Curve]

    def has(self, kind: str) -> bool:
        return any(name == kind for name, _, _ in self.curves)

    def seconds(self, kind: str, nbytes: float, group: int, ranks: int) -> float:
        """One collective of all groups of `group` in a job of `ranks` at once, each rank sending `nbytes`."""
        jobs = sorted({job for name, job, _ in self.curves if name == kind})
        at = [job for job in jobs if job >= group] or jobs[-1:]
        return Curve(tuple(at), tuple(self._in_job(kind, nbytes, group, job) for job in at), proportional=True)(ranks)

    def _in_job(self, kind: str, nbytes: float, group: int, job: int) -> float:
        sizes = sorted(size for name, other, size in self.curves if name == kind and other == job)
        times = tuple(self.curves[kind, job, size](nbytes) for size in sizes)
        return Curve(tuple(sizes), times, proportional=True)(group)


def shares(hardware: HardwareConfig) -> Shares | None:
    """A file's curves of compute; None if it has none."""
    if not hardware.products.width or not hardware.attention:
        return None
    rows = sorted(hardware.attention, key=lambda row: row.head_dim)
    attention = tuple((row.head_dim, Curve(tuple(row.length), tuple(row.share))) for row in rows)
    return Shares(Curve(tuple(hardware.products.width), tuple(hardware.products.share)), attention)


def exchanges(rows: Sequence[MeasuredExchange]) -> Exchanges | None:
    """A file's curves of collectives; None if it has none."""
    curves = {
        (row.kind, row.ranks, row.group): Curve(
            tuple(row.bytes), tuple(time * 1e-6 for time in row.us), proportional=True
        )
        for row in rows
    }
    return Exchanges(curves) if curves else None


def turns(hardware: HardwareConfig, ranks: int) -> float:
    """How many times as long as alone an operation takes on one of so many ranks."""
    if not hardware.ranks_take_turns:
        return 1.0
    share = max(1.0, ranks / (hardware.devices_per_host or 1))
    measured = hardware.turns
    return share * Curve(tuple(measured.ranks), tuple(measured.times))(ranks) if measured.ranks else share
