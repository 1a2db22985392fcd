"""The inference benchmark that `infer.py` runs: measure, compare with the reference, report.

Protocol (papers, "Measurement Methodology"): `runs` runs of `warmup` untimed and `iterations` timed steps each.
All runs share one launch and one set of weights; each has tokens and a warm-up of its own, and the interval is
taken over the runs' means. A step is one forward pass of the whole model over one batch; ranks start it
together, and its time is the slowest rank's.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from helix.comm.launch import launch
from helix.config.environment import resolve_device, started
from helix.config.methods import to_name
from helix.config.schema import ITEMSIZE, InferConfig, digest, expert_parallel, to_grid, to_shape
from helix.parallel.strategy import HelixStrategy
from helix.partition.cost import cheapest_schedule
from helix.partition.options import AttentionOptions
from helix.study.accuracy import Check, compare
from helix.study.measure import BenchmarkModule, Measured, Stopwatch, step_loader
from helix.study.report import Accuracy, Memory, Method, Report, Schedules, Tracked, Traffic, now, write
from helix.study.statistics import summarize
from helix.study.table import show
from helix.study.text import byte_batches, corpus
from helix.study.tracking import Tracker, track

DTYPES = {"64-true": torch.float64, "32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
# Different batches of text are cycled through, so that a long protocol does not hold all of its tokens at once.
DISTINCT_BATCHES = 64


def run(settings: InferConfig, run_dir: Path) -> None:
    """Run the benchmark that was configured and checked; write report.json and show the table.

    Raises:
        RankError: if a rank was killed.
    """
    began = now()
    local_ranks = ((here := started()) and here.local_ranks) or settings.parallel.ranks
    device = resolve_device(settings.device, local_ranks)
    if settings.model.experts:
        from helix.models.experts import load_deepspeed

        load_deepspeed(device)  # before the fork: one import for all ranks
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    measured = launch(
        _rank, settings, run_dir, device, began, time.time(), ranks=settings.parallel.ranks, device=device
    )
    report = measured[0]
    if report is not None and (here is None or here.rank == 0):
        show(report)


def _rank(settings: InferConfig, run_dir: Path, device: str, began: str, launched_at: float) -> Report | None:
    """What each rank does; rank 0 returns the report."""
    startup_s = _slowest(time.time() - launched_at)
    if dist.get_rank() != 0:
        measured, check = _measure(settings, device, Tracker(None, None))
        _gather(measured, check)
        return None
    run_dir.mkdir(parents=True, exist_ok=True)
    with track(settings.logger, run_dir, asdict(settings)) as tracker:
        measured, check = _measure(settings, device, tracker)
        everyone = _gather(measured, check)
        report = _report(settings, began, everyone, check, _tracked(settings, tracker, run_dir))
        write(report, run_dir / "report.json")
        tracker.summary(_headline(report) | {"startup_s": startup_s})
    return report


def _measure(settings: InferConfig, device: str, tracker: Tracker) -> tuple[Measured, Check]:
    work, parallel = settings.workload, settings.parallel
    options = resolve_options(settings)
    module = BenchmarkModule(
        to_shape(settings.model),
        options,
        expert_parallel(settings.model, parallel),
        DTYPES[settings.precision],
        settings.seed,
    )
    watch = Stopwatch(work.warmup, work.iterations, work.runs, work.batch_size * work.seq_len, tracker)
    tokens = _tokens(settings)
    trainer = Trainer(
        strategy=HelixStrategy(to_grid(parallel), parallel.data, parallel.stage),
        accelerator=device,
        devices=_local_devices(device),
        num_nodes=dist.get_world_size() // _local_devices(device),
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    steps = work.runs * (work.warmup + work.iterations)
    trainer.predict(module, step_loader(tokens, steps, parallel.data), return_predictions=False)
    module.to(device)  # Lightning moved it off the device at the end
    return watch.measured, compare(module, tokens[0], parallel.data)


def _local_devices(device: str) -> int:
    here = started()
    return here.local_ranks if here else dist.get_world_size()


def resolve_options(settings: InferConfig) -> AttentionOptions:
    """The attention's options with `auto` resolved for this batch and length."""
    parallel, model, work = settings.parallel, settings.model, settings.workload
    schedule = parallel.schedule
    if schedule == "auto":
        schedule = cheapest_schedule(
            to_shape(model).layout,
            to_grid(parallel),
            work.batch_size // parallel.data,
            work.seq_len,
            model.causal,
            ITEMSIZE[settings.precision],
        )
    return AttentionOptions(schedule, parallel.aggregate, parallel.concat, parallel.projection, parallel.residual)


def _tokens(settings: InferConfig) -> torch.Tensor:
    """Batches of bytes of a real text: [batches, batch_size, seq_len], the same on every rank."""
    work = settings.workload
    steps = work.runs * (work.warmup + work.iterations)
    batches = byte_batches(
        corpus(work.text), work.batch_size, work.seq_len, min(steps, DISTINCT_BATCHES), settings.seed
    )
    return torch.from_numpy(batches)


def _slowest(seconds: float) -> float:
    times: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(times, seconds)
    return max(times)


def _gather(measured: Measured, check: Check) -> list[tuple[Measured, Check]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (measured, check))
    return everyone


def _tracked(settings: InferConfig, tracker: Tracker, run_dir: Path) -> Tracked | None:
    if tracker.path is None or tracker.mode is None:
        return None
    return Tracked(tracker.mode, str(tracker.path.relative_to(run_dir.resolve())), tracker.id)


def _report(
    settings: InferConfig, began: str, everyone: list[tuple[Measured, Check]], check: Check, tracked: Tracked | None
) -> Report:
    work, parallel, options = settings.workload, settings.parallel, resolve_options(settings)
    tokens = work.batch_size * work.seq_len
    # [ranks, runs, iterations]: a step lasts until its last rank is done.
    step_s = np.array([m.step_s for m, _ in everyone]).max(0).mean(-1)
    comm_s = np.array([m.comm_s for m, _ in everyone]).mean(0) / work.iterations
    checks = [c for _, c in everyone]
    # One rank's bytes stand for all: one that disagrees with its closed form if there is any, else the busiest.
    worst = max(checks, key=lambda c: (c.executed != c.predicted, sum(c.executed.values())))
    heaviest = max((m for m, _ in everyone), key=lambda m: m.peak_bytes)
    return Report(
        started_at=began,
        method=Method(
            to_name(parallel), parallel.m, parallel.n, Schedules(options.schedule), parallel.data, parallel.stage
        ),
        world_size=len(everyone),
        model=asdict(settings.model),
        hardware=asdict(settings.hardware),
        workload=asdict(work),
        precision=settings.precision,
        seed=settings.seed,
        tokens_per_s=summarize(tokens / step_s),
        step_ms=summarize(step_s * 1e3),
        comm_ms_per_token=summarize(comm_s * 1e3 / tokens),
        memory_bytes_per_rank=Memory(
            weights=heaviest.weight_bytes,
            activations_peak=heaviest.activation_bytes,
            peak=heaviest.peak_bytes,
            predicted=max(c.predicted_weight_bytes for c in checks),
        ),
        comm_bytes_per_rank_per_step=Traffic(worst.executed, worst.predicted),
        accuracy=Accuracy(check.reference, check.relative_error, check.relative_error_to_h_heads),
        wandb=tracked,
        settings=digest(settings),
    )


def _headline(report: Report) -> dict[str, float | bool]:
    return {
        "tokens_per_s/mean": report.tokens_per_s.mean,
        "step_ms/mean": report.step_ms.mean,
        "comm_ms_per_token/mean": report.comm_ms_per_token.mean,
        "relative_error": report.accuracy.relative_error,
        "bytes_agree": report.comm_bytes_per_rank_per_step.agrees,
    }
