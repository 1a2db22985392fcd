"""`helix.plan`: the layout to choose for a model, a machine and some work, with what it costs and why."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from helix.config.bounds import at_least, bounded, one_of
from helix.config.plan_schema import MODES, RECOMPUTE
from helix.config.schema import ConfigError, HardwareConfig, ModelConfig
from helix.config.train_schema import PRECISIONS
from helix.config.values import check_values
from helix.planner import catalogue
from helix.planner.band import band
from helix.planner.candidates import Asked, check_asked, methods
from helix.planner.estimate import Estimator
from helix.planner.limits import refuse
from helix.planner.machine import machine_of
from helix.planner.reasons import few_words, fewer, reasons
from helix.planner.search import best_of_methods, check_goal, pareto, search
from helix.planner.work import HEADROOM, Estimate, Work


@dataclass(frozen=True)
class Plan:
    """What a search over layouts came to.

    Args:
        model, hardware: by name.
        devices: that every layout uses.
        goal: throughput, latency, ttft, tpot or memory.
        best: the layout to take.
        rivals: the best layout of each method, the best method first; `best` is among them.
        runner_up: the best layout with another name than the best one's; None where there is no other.
        searched: the methods besides Helix with m > 1 that were, in words.
        pareto: layouts that nothing equals or betters in throughput, latency and memory at once, the fastest first.
        considered: layouts whose dims are legal; fitting: those of them worth costing that fit in memory.
        reasons: why `best` is what it is; because: the first of them in a few words.
        error: part by which modelled times were off measured ones at the median, where this hardware's file says;
            None where nobody has measured.
        search_s: how long the search took.
    """

    model: str
    hardware: str
    devices: int
    work: Work
    goal: str
    best: Estimate
    rivals: tuple[Estimate, ...]
    runner_up: Estimate | None
    searched: tuple[str, ...]
    pareto: tuple[Estimate, ...]
    considered: int
    fitting: int
    reasons: tuple[str, ...]
    because: str
    error: float | None
    search_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in seconds, memory in bytes."""
        out = asdict(self)
        out["best"] = _as_dict(self.best)
        out["runner_up"] = None if self.runner_up is None else _as_dict(self.runner_up)
        for name in ("rivals", "pareto"):
            out[name] = [_as_dict(one) for one in getattr(self, name)]
        out["assumptions"] = list(self.assumptions)
        return out

    @property
    def band(self) -> str:
        """How far off the times may be, in words."""
        return band(self.error, self.work.mode)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures stand on."""
        return (
            self.band,
            f"Besides m > 1 the search knows {', '.join(self.searched)} and their products.",
            "Nothing is hidden behind computation, except a context-parallel ring behind its own attention.",
            "Experts are chosen at random; a router that is less even costs more.",
            f"At most {HEADROOM:.0%} of a device's memory may be filled.",
        )


@dataclass
class _Arguments:
    """What a plan is asked with, each with its legal values."""

    mode: str = one_of(None, MODES)
    batch: int = at_least(1)
    length: int = at_least(1)
    new_tokens: int = at_least(1)
    precision: str = one_of(None, PRECISIONS)
    commonest: float = bounded(at_least=0, at_most=1)
    devices: int | None = at_least(1)
    recompute: str = one_of(None, RECOMPUTE)
    m: int | None = at_least(1)
    n: int | None = at_least(1)
    data: int | None = at_least(1)
    stage: int | None = at_least(1)


def plan(
    model: str | ModelConfig,
    hardware: str | HardwareConfig,
    devices: int | None = None,
    *,
    mode: str = "forward",
    batch: int = 1,
    length: int = 2048,
    new_tokens: int = 256,
    precision: str = "bf16-true",
    goal: str = "throughput",
    asked: Asked = Asked(),  # noqa: B008  frozen
    commonest: float = 0.0,
) -> Plan:
    """Choose how to lay a model over devices.

    >>> helix.plan("llama3_70b", "dgx_h100", 16, mode="generate", batch=1, length=8192, new_tokens=256, goal="tpot")

    Args:
        model, hardware: by their names in conf/model and conf/hardware, or as configured; a model also by the path of
            a Hugging Face folder, of which config.json is read, and hardware by that of a file.
        devices: how many; None for as many as the hardware's system has.
        mode: forward (one pass over whole sequences), train (a step of AdamW) or generate.
        batch: sequences over all replicas.
        length: tokens of a sequence, or of a prompt.
        new_tokens: to generate for each sequence, in generation.
        precision: in Lightning's names.
        goal: throughput, latency, memory; in generation also ttft and tpot.
        asked: sizes that are given rather than searched, and what else the search is to respect.
        commonest: the commonest token's part of all, of a model with experts; 0 where nobody knows.

    Raises:
        ConfigError: if an argument, a name or a figure of the hardware is missing or wrong.
        PartitionError: if the model's dims do not fit together, or are not of heads.
        Misfit: if no layout fits: which limit binds, by how much, and the nearest layout that fits.
    """
    generates = mode == "generate"
    check_values(
        _Arguments(
            mode, batch, length, new_tokens if generates else 1, precision, commonest, devices, asked.recompute,
            asked.m, asked.n, asked.data, asked.stage,
        )
    )  # fmt: skip
    check_asked(asked, mode)
    check_goal(goal, mode)
    settings = catalogue.model(model) if isinstance(model, str) else model
    machine_file = catalogue.hardware(hardware) if isinstance(hardware, str) else hardware
    if machine_file.memory_GB_per_device == 0:
        raise ConfigError("hardware.memory_GB_per_device must be more than 0, or null where it does not matter")
    work = Work(mode, batch, length, new_tokens if generates else 0, precision, commonest)
    estimator = Estimator(catalogue.shape(settings, mode), machine_of(machine_file, precision, devices), work)
    started = time.perf_counter()
    found = search(estimator, goal, asked)
    searched = time.perf_counter() - started
    if not found.fitting:
        raise refuse(estimator, asked, found, goal, (settings.name, machine_file.name))
    less = fewer(estimator, found.fitting[0], goal, asked)
    return Plan(
        model=settings.name,
        hardware=machine_file.name,
        devices=estimator.machine.devices,
        work=work,
        goal=goal,
        best=found.fitting[0],
        rivals=tuple(best_of_methods(found.fitting).values()),
        runner_up=next((one for one in found.fitting if one.layout.name != found.fitting[0].layout.name), None),
        searched=methods(estimator.shape, work, asked),
        pareto=tuple(pareto(found.fitting)),
        considered=found.considered,
        fitting=len(found.fitting),
        reasons=tuple(reasons(estimator, found, goal, asked, less)),
        because=few_words(estimator, found.fitting[0], less),
        error=estimator.machine.error,
        search_s=searched,
    )


def _as_dict(one: Estimate) -> dict[str, Any]:
    return {
        "name": one.layout.name,
        "layout": asdict(one.layout),
        "tokens_per_s": one.tokens_per_s,
        "seconds": asdict(one.seconds) | {"total": one.seconds.total},
        "ttft_s": one.ttft_s,
        "tpot_s": one.tpot_s,
        "memory_bytes": asdict(one.memory) | {"total": one.memory.total},
    }
