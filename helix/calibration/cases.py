"""What predictions are held against: works of a few sizes, and for each some of the layouts that could run it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from helix.config.methods import from_name, to_name
from helix.config.parallel import ParallelConfig
from helix.config.schema import HardwareConfig, ModelConfig
from helix.planner import catalogue
from helix.planner.candidates import Asked, candidates
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import machine_of
from helix.planner.routing import COMMONEST_BYTE
from helix.planner.work import Estimate, Work

# Layers of the catalogue's models, and their (batch, length) by the device: steps of tenths of a second on two cores.
LAYERS = 2
WORKS = {
    "cpu": (("dense", 16, 64), ("dense", 4, 256), ("dense", 1, 1024), ("moe", 16, 64), ("moe", 2, 256)),
    "cuda": (
        ("paper_dense_2l", 16, 1024),
        ("paper_dense_2l", 4, 4096),
        ("paper_dense_2l", 1, 16384),
        ("moe", 64, 1024),
        ("moe", 8, 4096),
    ),
}
PRECISION = {"cpu": "32-true", "cuda": "bf16-true"}


@dataclass(frozen=True)
class Case:
    """One work on some ranks, and layouts that take turns in doing it; the first one is the planner's choice."""

    model: ModelConfig
    ranks: int
    work: Work
    estimates: tuple[Estimate, ...]

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.work.batch} x {self.work.length}, {self.ranks} ranks"


def cases(hardware: HardwareConfig, device: str, ranks: int, layouts: int) -> Iterator[Case]:
    """Every work on 2, 4, 8, .. up to `ranks` ranks.

    Raises:
        ConfigError: naming the figures that the hardware's file lacks.
    """
    size = 2
    while size <= ranks:
        machine = machine_of(hardware, PRECISION[device], size)
        for name, batch, length in WORKS[device]:
            model = replace(catalogue.model(name), layers=LAYERS)
            work = Work("forward", batch, length, precision=PRECISION[device], commonest=COMMONEST_BYTE)
            estimator = Estimator(catalogue.shape(model, work.mode), machine, work)
            yield Case(model, size, work, _some(estimator, size, layouts))
        size *= 2


def _some(estimator: Estimator, ranks: int, count: int) -> tuple[Estimate, ...]:
    """Half of them those that should be the fastest, the other half evenly from all others, the slowest among them."""
    alike = candidates(estimator.shape, estimator.work, ranks, Asked(runnable=True))
    found = sorted((estimator.estimate(layout) for one in alike for layout in one), key=lambda one: one.seconds.total)
    found = list({to_name(named(one.layout)): one for one in reversed(found)}.values())[::-1]  # microbatches have none
    if len(found) <= count:
        return tuple(found)
    best, rest = found[: -(-count // 2)], found[-(-count // 2) :]
    wanted = count - len(best)
    return (*best, *(rest[(place + 1) * len(rest) // wanted - 1] for place in range(wanted)))


def named(layout: Layout) -> ParallelConfig:
    """The layout as a command takes it, with its schedule."""
    parallel = from_name(layout.name)
    schedule = layout.prefill if layout.method == "helix" and layout.m > 1 else "auto"
    return replace(parallel, schedule=schedule, microbatches=layout.microbatches)
