"""The papers' 16 H100s, recomputed: what they claim for each of their models, and what the time model gives.

The papers: "Helix: Two-Level Attention Partitioning for Large-Scale Transformer Deployment" (16 layers), "Phase 1: Key
Points Extraction" (2 layers), "Two-Level Attention Partitioning for Large-Scale Transformers: A Concise Version" (4
layers, dense and MoE).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from helix.config.schema import Misfit, to_shape
from helix.partition.grid import Grid, divisors
from helix.partition.schedules import legal_schedules
from helix.planner import catalogue, published
from helix.planner.candidates import Asked
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import machine_of
from helix.planner.search import search
from helix.planner.work import Estimate, Work

HARDWARE, PRECISION, RANKS = "dgx_h100_x2", "16-true", 16
# Stated in two of the three papers, 16 layers and 2 layers, and taken for the third.
LENGTH = 10_000
# Largest number of microbatches of tp8_pp2; the papers state none.
MICROBATCHES = 16


@dataclass(frozen=True)
class Claim:
    """What a paper says of one of its models.

    Args:
        section: where it says so.
        tokens_per_s, ms_per_token: of "TP=8, PP=2" and of "Proposed (m x n = 16)"; the latter is their "TPOT",
            "average synchronization and communication overhead time per token".
    """

    model: str
    batch: int
    paper: str
    section: str
    tokens_per_s: tuple[float, float] = (1.2e6, 1.58e6)
    ms_per_token: tuple[float, float] = (0.35, 0.22)


CLAIMS = (
    Claim("paper_dense_16l", 128, "Helix: Two-Level Attention Partitioning ..", "Results"),
    Claim("paper_dense_2l", 128, "Phase 1: Key Points Extraction", "Technical Achievement"),
    Claim("paper_dense_4l", 1024, ".. A Concise Version", "Results, rows Dense"),
    Claim("paper_moe_4l", 1024, ".. A Concise Version", "Results, rows MoE", (0.85e6, 1.15e6), (0.45, 0.30)),
)


@dataclass(frozen=True)
class Setting:
    """One of the papers' models on their machine.

    Args:
        rivals: layouts that they compare with and those that they leave out.
        grids: Helix's 16 ranks with every legal schedule.
        best: the fastest of these and of all that a search finds.
        bound: tokens/s if every device did nothing but the model's arithmetic at its data sheet's peak.
        reached: the least and the most of a modelled speed that published measurements reached (on A100s).
    """

    claim: Claim
    rivals: tuple[Estimate, ...]
    grids: tuple[Estimate, ...]
    best: Estimate
    bound: float
    reached: tuple[float, float]


def settings() -> list[Setting]:
    """Every setting, recomputed."""
    return [setting(claim) for claim in CLAIMS]


def setting(claim: Claim) -> Setting:
    """One of them."""
    estimator, hardware = _estimator(claim), catalogue.hardware(HARDWARE)
    if hardware.matmul_bf16_TFLOP_per_s is None:
        raise Misfit(f"hardware={HARDWARE} has no matmul_bf16_TFLOP_per_s")
    flops = estimator.passes.flops(Layout("data"), claim.batch, LENGTH) / (claim.batch * LENGTH)
    rivals, grids = tuple(_rivals(estimator)), tuple(_grids(estimator))
    found = search(estimator, "throughput", Asked()).fitting
    return Setting(
        claim,
        rivals,
        grids,
        max((*rivals, *grids, *found), key=lambda one: one.tokens_per_s),
        RANKS * hardware.matmul_bf16_TFLOP_per_s * 1e12 / flops,
        published.reached(),
    )


def _estimator(claim: Claim) -> Estimator:
    shape, hardware = to_shape(catalogue.model(claim.model)), catalogue.hardware(HARDWARE)
    work = Work("forward", claim.batch, LENGTH, precision=PRECISION)
    return Estimator(shape, machine_of(hardware, PRECISION, RANKS), work)


def _rivals(estimator: Estimator) -> Iterator[Estimate]:
    shape = estimator.shape
    layouts = [
        Layout("tensor", n=8, stage=2, microbatches=MICROBATCHES),
        Layout("tensor", n=RANKS),
        Layout("data", data=RANKS),
        Layout("ulysses", tokens=RANKS),
        Layout("context", n=8, tokens=2),
    ]
    for layout in layouts:
        if not (shape.experts and layout.tokens > 1):
            yield from _cut(estimator, layout)


def _grids(estimator: Estimator) -> Iterator[Estimate]:
    shape, batch = estimator.shape, estimator.work.batch
    for m in divisors(RANKS):
        grid = Grid(m, RANKS // m)
        if grid.fits(shape.layout):
            names = legal_schedules(shape.layout, grid, batch, LENGTH) if m > 1 else ["batch"]
            for name in names:
                yield from _cut(estimator, Layout("helix", m, grid.n, prefill=name))


def _cut(estimator: Estimator, layout: Layout) -> Iterator[Estimate]:
    """The layout with its batch in as few pieces as fit in memory, one after the other; nothing if none do.

    The papers do not say that a batch is one pass, and at 1024 x 10,000 tokens hardly anything fits in one.
    """
    samples = estimator.work.batch // layout.data
    for count in divisors(samples):
        cut = layout.at(microbatches=max(count, layout.microbatches))
        legal = layout.m == 1 or layout.prefill != "batch" or samples // count >= layout.m
        if legal and estimator.fits(estimator.memory(cut)):
            yield estimator.estimate(cut)
            return
