"""The papers' 16 H100s, recomputed: what they claim for each of their models, and what the time model gives."""

from __future__ import annotations

from dataclasses import dataclass

from helix.config.schema import Misfit, to_shape
from helix.partition.grid import Grid
from helix.partition.schedules import legal_schedules
from helix.partition.shape import TransformerShape
from helix.planner import catalogue
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import machine_of
from helix.planner.work import Estimate, Work

HARDWARE, PRECISION, RANKS = "dgx_h100_x2", "16-true", 16
# The same two figures are reported for every one of these models (DESIGN, section 7).
BASELINE_TOKENS_PER_S, CLAIMED_TOKENS_PER_S = 1.2e6, 1.58e6
LENGTH = 10_000
# Each model with its batch; the length is stated for one of them only, and taken for all.
SETTINGS = {"paper_dense_16l": 128, "paper_dense_2l": 128, "paper_dense_4l": 1024}


@dataclass(frozen=True)
class Setting:
    """One of the papers' models on their machine.

    Args:
        rows: layouts that they compare and those that they leave out, with every schedule of the exact ones.
        bound: tokens/s if every device did nothing but the model's arithmetic at its data sheet's peak.
    """

    model: str
    batch: int
    rows: tuple[tuple[Estimate, bool], ...]
    bound: float


def settings() -> list[Setting]:
    """Every setting, recomputed."""
    return [_setting(model, batch) for model, batch in SETTINGS.items()]


def _setting(model: str, batch: int) -> Setting:
    shape, hardware = to_shape(catalogue.model(model)), catalogue.hardware(HARDWARE)
    work = Work("forward", batch, LENGTH, precision=PRECISION)
    estimator = Estimator(shape, machine_of(hardware, PRECISION, RANKS), work)
    rows = []
    for layout in _layouts(shape, batch):
        one = estimator.estimate(layout)
        rows.append((one, estimator.fits(one.memory)))
    if hardware.matmul_bf16_TFLOP_per_s is None:
        raise Misfit(f"hardware={HARDWARE} has no matmul_bf16_TFLOP_per_s")
    flops = estimator.passes.flops(Layout("data"), batch, LENGTH)
    return Setting(model, batch, tuple(rows), RANKS * hardware.matmul_bf16_TFLOP_per_s * 1e12 * batch * LENGTH / flops)


def _layouts(shape: TransformerShape, batch: int) -> list[Layout]:
    out = [
        Layout("data", data=RANKS),
        Layout("tensor", n=8, stage=2, microbatches=16),
        Layout("tensor", n=RANKS),
        Layout("helix", 1, RANKS),
        Layout("ulysses", tokens=RANKS),
        Layout("context", n=8, tokens=2),
    ]
    for m, n in ((4, 4), (2, 8)):
        grid = Grid(m, n)
        if grid.fits(shape.layout):
            out += [Layout("helix", m, n, prefill=name) for name in legal_schedules(shape.layout, grid, batch, LENGTH)]
    return out
