"""`helix.plan`: the layout to choose for a model, a machine and some work, with what it costs and why."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from helix.config.schema import ConfigError, HardwareConfig, ModelConfig
from helix.planner import catalogue, published
from helix.planner.candidates import Asked
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
        if self.error is not None:
            return f"Times are modelled; against measurements on this hardware the median error was {self.error:.0%}."
        medians = sorted(table.median_error for table in published.tables())
        return (
            "Times are modelled, and nobody has held this hardware's file against measurements: their error is "
            "unknown. Against published tables of training on A100s, to which nothing was fitted, it is "
            f"{medians[0]:.0%} to {medians[-1]:.0%} at the median (python -m helix plan --published)."
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures stand on."""
        return (
            self.band,
            "Nothing is hidden behind computation, except a context-parallel ring behind its own attention.",
            "Experts are chosen at random; a router that is less even costs more.",
            f"At most {HEADROOM:.0%} of a device's memory may be filled.",
        )


def plan(
    model: str | ModelConfig,
    hardware: str | HardwareConfig,
    devices: int | None = None,
    *,
    mode: str = "forward",
    batch: int = 1,
    length: int = 2048,
    new_tokens: int = 0,
    precision: str = "bf16-true",
    goal: str = "throughput",
    asked: Asked = Asked(),  # noqa: B008  frozen
) -> Plan:
    """Choose how to lay a model over devices.

    >>> helix.plan("llama3_70b", "dgx_h100", 16, mode="generate", batch=1, length=8192, new_tokens=256, goal="tpot")

    Args:
        model, hardware: by their names in conf/model and conf/hardware, or as configured; a model also by the path of
            a Hugging Face folder, of which config.json is read.
        devices: how many; None for as many as the hardware's system has.
        mode: forward (one pass over whole sequences), train (a step of AdamW) or generate.
        batch: sequences over all replicas.
        length: tokens of a sequence, or of a prompt.
        new_tokens: to generate for each sequence.
        precision: in Lightning's names.
        goal: throughput, latency, memory; in generation also ttft and tpot.
        asked: sizes that are given rather than searched, and what else the search is to respect.

    Raises:
        ConfigError: if a name, a goal or a figure of the hardware is missing or wrong.
        PartitionError: if the model's dims do not fit together, or are not of heads.
        Misfit: if no layout fits: which limit binds, by how much, and the nearest layout that fits.
    """
    settings = catalogue.model(model) if isinstance(model, str) else model
    machine_file = catalogue.hardware(hardware) if isinstance(hardware, str) else hardware
    check_goal(goal, mode)
    if machine_file.memory_GB_per_device == 0:
        raise ConfigError("hardware.memory_GB_per_device must be more than 0, or null where it does not matter")
    work = Work(mode, batch, length, new_tokens, precision)
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
