"""`infer.py dry_run=true`: trace the methods that were asked for, write what was found, show the table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from helix.config.environment import gpus, speaks
from helix.config.methods import baselines_of, to_name
from helix.config.schema import PRETRAINED, ConfigError, InferConfig, ParallelConfig, digest
from helix.dryrun import timeline
from helix.dryrun.drawn import STEP, trace_step
from helix.dryrun.figures import DryRun, Refused, Traced
from helix.dryrun.table import show
from helix.dryrun.tracer import Trace
from helix.dryrun.world import pretended
from helix.generation.errors import CannotRun
from helix.parallel.methods.build import load
from helix.partition.grid import PartitionError
from helix.planner.band import band
from helix.planner.catalogue import CONF
from helix.planner.machine import Machine, machine_of
from helix.study.report import MethodLabel, Schedules, plain, write_whole

REPORT = "dry_run.json"
AUTO = "auto"
TRACED = {
    True: "Rank 0 was traced, on tensors without numbers, as on GPUs: fused attention and RMS norm are one kernel "
    "each, and a collective has one buffer for what it returns, as over NCCL.",
    False: "Rank 0 was traced, on tensors without numbers, as on CPUs: fused attention is one kernel, and collectives "
    "are built from exchanges, as over gloo; gloo's own buffers and the allocator's slack are not there.",
}
_SERIAL = "Times are those of each operator by itself, one after the other: nothing is hidden behind computation."
_EAGER = (
    "Traced times through memory are above the planner's, which counts norms, residuals, positions and activations as "
    "fused operations: eager PyTorch runs many more, each traced by itself."
)

# What the libraries under a method raise where a model's sizes do not suit them, or that are not there.
_OWN_ERRORS = (ImportError, RuntimeError)

# A layout -> what was traced of it, and its passes by name.
Trial = Callable[[ParallelConfig], tuple[Traced, list[tuple[str, Trace]]]]


def run(settings: InferConfig, run_dir: Path) -> None:
    """Trace in this process alone.

    Raises:
        ConfigError, PartitionError, CheckpointError: if the model, or the main method on it, cannot be built.
        CannotRun: if what builds it is not installed, or fails.
    """
    if not speaks():  # of ranks that a launcher started one is enough
        return
    began = time.monotonic()
    machine, notes = _machine(settings)
    gpu = _on_gpus(settings)
    trial, batch, length = _trial(settings, machine, gpu)
    main = to_name(settings.parallel)
    with pretended(settings.parallel.ranks, settings.hardware.devices_per_host or 1, direct=not gpu):
        try:
            found, passes = trial(settings.parallel)
        except _OWN_ERRORS as error:
            raise CannotRun(f"{main} cannot be traced: {_words(error)}") from error
        rivals = [_rival(trial, each) for each in baselines_of(settings)]
    report = DryRun(
        main=found,
        baselines=rivals,
        devices=settings.parallel.ranks,
        memory_bytes_per_device=None if machine is None else _finite(machine.memory_bytes),
        batch=batch,
        length=length,
        parallel=asdict(settings.parallel),
        model=asdict(settings.model),
        hardware=asdict(settings.hardware),
        workload=asdict(settings.workload),
        precision=settings.precision,
        notes=[TRACED[gpu], *notes],
        traced_s=time.monotonic() - began,
        settings=digest(settings),
    )
    path = None if machine is None else timeline.write(passes, machine, run_dir / "traces" / main)
    write_whole(json.dumps(plain(report), indent=2, allow_nan=False) + "\n", run_dir / REPORT)
    show(report, path)


def _machine(settings: InferConfig) -> tuple[Machine | None, list[str]]:
    """The machine that times are of, and what they are worth; none where its file lacks figures, and which."""
    if settings.hardware.name == AUTO:
        return None, [f"No times: hardware={AUTO} says nothing of a machine; take hardware={', '.join(_catalogue())}."]
    try:
        machine = machine_of(settings.hardware, settings.precision, settings.parallel.ranks)
    except ConfigError as error:
        return None, [f"No times: {error}."]
    mode = "generate" if settings.model.kind == PRETRAINED else "forward"
    return machine, [_SERIAL, _EAGER, band(machine.error, mode)]


def _catalogue() -> list[str]:
    """Machines that have figures."""
    return [path.stem for path in sorted((CONF / "hardware").glob("*.yaml")) if path.stem != AUTO]


def _on_gpus(settings: InferConfig) -> bool:
    """Whether the ranks compute on GPUs: on those of the hardware, of which each has memory of its own."""
    if settings.device != "auto":
        return settings.device == "cuda"
    if settings.hardware.name == AUTO:
        return gpus() > 0
    return settings.hardware.memory_GB_per_device is not None and not settings.hardware.ranks_take_turns


def _trial(settings: InferConfig, machine: Machine | None, gpu: bool) -> tuple[Trial, int, int]:
    """What traces a method; the samples and tokens that it is given."""
    if settings.model.kind != PRETRAINED:
        methods = {settings.parallel.method, *(each.method for each in baselines_of(settings))}
        load(methods, settings.model.experts > 0, "cpu")

        def trial(parallel: ParallelConfig) -> tuple[Traced, list[tuple[str, Trace]]]:
            traced, trace = trace_step(settings, parallel, machine, gpu)
            return traced, [(STEP, trace)]

        return trial, settings.workload.batch_size, settings.workload.seq_len
    from helix.dryrun.answered import question, trace_answer

    asked = question(settings)
    return partial(trace_answer, settings, machine=machine, asked=asked, gpu=gpu), asked.batch, asked.length


def _rival(trial: Trial, parallel: ParallelConfig) -> Traced | Refused:
    try:
        return trial(parallel)[0]
    except (PartitionError, *_OWN_ERRORS) as error:
        label = MethodLabel(to_name(parallel), parallel.m, parallel.n, Schedules(None), parallel.data)
        return Refused(label, _words(error))


def _words(error: Exception) -> str:
    """The first line: libraries go on to tell where they were."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value
