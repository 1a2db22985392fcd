"""What predictions are held against: works of a few sizes, and for each some of the layouts that could run it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from helix.command.choose import concrete
from helix.config.methods import to_name
from helix.config.parallel import ParallelConfig
from helix.config.schema import HardwareConfig, InferConfig, LoggerConfig, WorkloadConfig
from helix.planner import catalogue
from helix.planner.candidates import Asked, candidates
from helix.planner.estimate import Estimator
from helix.planner.machine import machine_of
from helix.planner.work import Estimate, Work
from helix.study.text import byte_batches, corpus

# Layers of the catalogue's models, and their (batch, length) by the device: steps of tenths of a second on two cores.
LAYERS = 2
WORKS = {
    "cpu": (("dense", 16, 32), ("dense", 4, 128), ("dense", 1, 512), ("moe", 16, 32), ("moe", 2, 256)),
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
    """One work on some ranks, and the layouts that take turns in doing it.

    Args:
        job: what infer.py would be told, of whichever layout.
        layouts: by name, what the planner says of each; the first one is its choice.
    """

    ranks: int
    job: InferConfig
    layouts: dict[str, Estimate]

    @property
    def name(self) -> str:
        work = self.job.workload
        return f"{self.job.model.name} {work.batch_size} x {work.seq_len}, {self.ranks} ranks"

    def settings(self, name: str) -> InferConfig:
        """What infer.py would be told of one of the layouts."""
        layout = concrete(self.layouts[name].layout, "forward", self.job.parallel)
        return replace(self.job, parallel=layout)


def cases(hardware: HardwareConfig, device: str, ranks: int, layouts: int) -> Iterator[Case]:
    """Every work on 2, 4, 8, .. up to `ranks` ranks.

    Args:
        layouts: of each case.

    Raises:
        ConfigError: naming the figures that the hardware's file lacks.
    """
    size = 2
    while size <= ranks:
        machine = machine_of(hardware, PRECISION[device], size)
        for name, batch, length in WORKS[device]:
            job = InferConfig(
                parallel=ParallelConfig(m=1, n=1),
                model=replace(catalogue.model(name), layers=LAYERS),
                hardware=hardware,
                workload=WorkloadConfig("validation", batch, length, warmup=1, iterations=2, runs=2),
                logger=LoggerConfig(kind="none"),
                precision=PRECISION[device],
                device=device,
            )
            share = commonest(tokens_of(job))
            work = Work("forward", batch, length, precision=job.precision, commonest=share)
            estimator = Estimator(catalogue.shape(job.model, work.mode), machine, work)
            yield Case(size, job, _some(estimator, layouts, job.parallel))
        size *= 2


def tokens_of(job: InferConfig) -> NDArray[np.int64]:
    """[B, T] of the text, as every rank reads it."""
    work = job.workload
    tokens: NDArray[np.int64] = byte_batches(corpus(work.text), work.batch_size, work.seq_len, 1, job.seed)[0]
    return tokens


def commonest(tokens: NDArray[np.int64]) -> float:
    """The commonest token's part of all."""
    return float(np.bincount(tokens.flatten()).max() / tokens.size)


def _some(estimator: Estimator, count: int, asked: ParallelConfig) -> dict[str, Estimate]:
    """Half of them those that should be the fastest, the other half evenly from all others, the slowest among them."""
    alike = candidates(estimator.shape, estimator.work, estimator.machine.devices, Asked(runnable=True))
    found: dict[str, Estimate] = {}
    every = (estimator.estimate(layout) for one in alike for layout in one)
    for one in sorted(every, key=lambda one: one.seconds.total):
        # Of pipelines that differ in their microbatches alone, which no name tells of, the best.
        found.setdefault(to_name(concrete(one.layout, "forward", asked)), one)
    names = list(found)
    if len(names) > count:
        best, rest = names[: -(-count // 2)], names[-(-count // 2) :]
        wanted = count - len(best)
        names = [*best, *(rest[(place + 1) * len(rest) // wanted - 1] for place in range(wanted))]
    return {name: found[name] for name in names}
