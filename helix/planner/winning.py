"""Where slicing features wins: the best layout with m > 1 against the best of all others, over what decides it.

Five quantities, two at a time: devices for each key/value head and sequences for each device, the width of a head and
the length of a sequence, the bandwidth of the links and the length. What a panel does not vary is what was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from helix.config.schema import ConfigError, HardwareConfig
from helix.partition.shape import TransformerShape
from helix.planner.candidates import Asked, methods
from helix.planner.estimate import Estimator
from helix.planner.machine import machine_of
from helix.planner.search import search, times_as_good
from helix.planner.work import Estimate, Work

DEVICES_PER_KV_HEAD = tuple(map(Fraction, ("1/2", "1", "2", "4", "8", "16")))
SEQUENCES_PER_DEVICE = tuple(map(Fraction, ("1/64", "1/16", "1/4", "1", "4")))
WIDTHS = tuple(map(Fraction, ("1/4", "1/2", "1", "2", "4", "8")))  # of a head, times the model's own
LENGTHS = (1024, 4096, 16_384, 65_536, 262_144)
LINKS = tuple(map(Fraction, ("1/16", "1/4", "1", "4", "16")))  # bandwidth, times the hardware's own


@dataclass(frozen=True)
class Cell:
    """One place of a panel.

    Args:
        x, y: its labels.
        sliced: the best layout with m > 1; rival: the best of all others. None where none fits.
        goal: what both are the best in.
        legal: whether there is such a place: a batch of half a sequence is none.
    """

    x: str
    y: str
    sliced: Estimate | None
    rival: Estimate | None
    goal: str
    legal: bool = True

    @property
    def ratio(self) -> float | None:
        """How many times as good as its rival the sliced layout is; None where either does not exist."""
        if self.sliced is None or self.rival is None:
            return None
        return times_as_good(self.goal, self.sliced, self.rival)


@dataclass(frozen=True)
class Panel:
    """One map: two quantities vary.

    Args:
        work: what the devices do, where the panel does not vary it; goal: what layouts are compared by.
        x_name, y_name: of the quantities; fixed: what the others are, in words.
        rivals: the methods besides m > 1 that are searched.
    """

    work: Work
    goal: str
    x_name: str
    y_name: str
    fixed: str
    cells: tuple[Cell, ...]
    rivals: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each place with its ratio and its two layouts."""
        cells = [
            {
                "x": one.x,
                "y": one.y,
                "legal": one.legal,
                "sliced": None if one.sliced is None else one.sliced.layout.name,
                "rival": None if one.rival is None else one.rival.layout.name,
                "ratio": one.ratio,
            }
            for one in self.cells
        ]
        return {
            "goal": self.goal,
            "x": self.x_name,
            "y": self.y_name,
            "fixed": self.fixed,
            "rivals": self.rivals,
            "cells": cells,
        }


@dataclass(frozen=True)
class Place:
    """What one panel starts from.

    Args:
        shape: the model's, as its mode takes it.
        devices: where the panel does not vary them.
    """

    shape: TransformerShape
    hardware: HardwareConfig
    devices: int
    work: Work
    goal: str
    asked: Asked

    def cell(self, x: str, y: str) -> Cell:
        """The two best layouts here."""
        machine = machine_of(self.hardware, self.work.precision, self.devices)
        found = search(Estimator(self.shape, machine, self.work), self.goal, self.asked).fitting
        sliced = next((each for each in found if each.layout.m > 1), None)
        rival = next((each for each in found if each.layout.m == 1), None)
        return Cell(x, y, sliced, rival, self.goal)


def panels(place: Place) -> list[Panel]:
    """The three maps of one mode."""
    work, shape = place.work, place.shape
    batch, devices, rivals = f"batch {work.batch}", f"{place.devices} devices", methods(shape, work, place.asked)
    return [
        Panel(
            work, place.goal, "devices / key/value heads", "batch / devices", f"length {work.length}",
            _cells(DEVICES_PER_KV_HEAD, SEQUENCES_PER_DEVICE, lambda x, y: _spread(place, x, y)), rivals,
        ),
        Panel(
            work, place.goal, "features of a head", "length", f"{devices}, {batch}, heads x features kept",
            _cells(_widths(shape), LENGTHS, lambda x, y: _wide(place, x, y)), rivals,
        ),
        Panel(
            work, place.goal, f"bandwidth of all links, x {place.hardware.name}", "length", f"{devices}, {batch}",
            _cells(LINKS, LENGTHS, lambda x, y: _linked(place, x, y)), rivals,
        ),
    ]  # fmt: skip


Value = Fraction | int


def _cells(xs: Sequence[Value], ys: Sequence[Value], at: Callable[[Value, Value], Place | None]) -> tuple[Cell, ...]:
    return tuple(_each(xs, ys, at))


def _each(xs: Sequence[Value], ys: Sequence[Value], at: Callable[[Value, Value], Place | None]) -> Iterator[Cell]:
    for x in xs:
        for y in ys:
            place = at(x, y)
            yield Cell(str(x), str(y), None, None, "", legal=False) if place is None else place.cell(str(x), str(y))


def _spread(place: Place, per_head: Value, per_device: Value) -> Place | None:
    """So many devices and sequences; None where either is no whole number, or the hardware has no such many."""
    devices = place.shape.kv_heads * per_head
    batch = devices * per_device
    if Fraction(devices).denominator != 1 or Fraction(batch).denominator != 1 or devices < 2:
        return None
    try:
        machine_of(place.hardware, place.work.precision, int(devices))
    except ConfigError:  # a machine of one island, whose links between islands nobody has stated
        return None
    return replace(place, devices=int(devices), work=replace(place.work, batch=int(batch)))


def _widths(shape: TransformerShape) -> list[int]:
    """Of heads, of which there are as many fewer as they are wider."""
    found = []
    for factor in WIDTHS:
        sizes = shape.head_dim * factor, shape.heads / factor, shape.kv_heads / factor
        if all(Fraction(size).denominator == 1 for size in sizes) and sizes[0] % 2 == 0:
            found.append(int(sizes[0]))
    return found


def _wide(place: Place, head_dim: Value, length: Value) -> Place:
    shape, factor = place.shape, Fraction(head_dim, place.shape.head_dim)
    heads, kv_heads = int(shape.heads / factor), int(shape.kv_heads / factor)
    changed = replace(shape, head_dim=int(head_dim), heads=heads, kv_heads=kv_heads)
    return replace(place, shape=changed, work=replace(place.work, length=int(length)))


def _linked(place: Place, times: Value, length: Value) -> Place:
    """Other links: by their stated bandwidth, since what was measured holds for those that there are."""
    hardware = place.hardware
    changed = replace(
        hardware,
        link_GB_per_s=_times(hardware.link_GB_per_s, times),
        host_link_GB_per_s=_times(hardware.host_link_GB_per_s, times),
        exchanges=[],
    )
    return replace(place, hardware=changed, work=replace(place.work, length=int(length)))


def _times(rate: float | None, times: Value) -> float | None:
    return None if rate is None else float(rate * times)
