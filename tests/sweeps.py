"""Sweeps made up for tests: the smallest settings, jobs of them, and reports with invented figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from helix.command.sweep import REPORT, SweepJob
from helix.config.schema import (
    HardwareConfig,
    InferConfig,
    LoggerConfig,
    ModelConfig,
    ParallelConfig,
    WorkloadConfig,
    digest,
)
from helix.study.report import Accuracy, Memory, MethodLabel, Report, Schedules, Traffic, write
from helix.study.statistics import summarize

PNG = b"\x89PNG\r\n"
# `settings` as a user types them.
TINY = [
    "model=dense",
    "model.layers=1",
    "model.width=64",
    "model.heads=4",
    "model.head_dim=16",
    "model.mlp_hidden=64",
    "workload.batch_size=4",
    "workload.seq_len=32",
    "workload.iterations=1",
    "workload.runs=2",
    "workload.warmup=0",
    "logger=none",
]


def settings(m: int = 1, n: int = 1, seq_len: int = 32, **parallel: int | str) -> InferConfig:
    return InferConfig(
        parallel=ParallelConfig(m=m, n=n, **parallel),  # type: ignore[arg-type]
        model=ModelConfig(name="dense", layers=1, width=64, heads=4, head_dim=16, mlp_hidden=64),
        hardware=HardwareConfig(name="auto", source="this machine"),
        workload=WorkloadConfig(name="small", batch_size=4, seq_len=seq_len, warmup=0, iterations=1, runs=2),
        logger=LoggerConfig(kind="none"),
    )


def a_job(folder: Path, number: int, m: int, n: int, *more: str, reason: str | None = None) -> SweepJob:
    one = settings(m, n)
    if "parallel.data=2" in more:
        one = replace(one, parallel=replace(one.parallel, data=2))
    overrides = ("parallel=helix", f"parallel.m={m}", f"parallel.n={n}", *more)
    return SweepJob(number, overrides, one, folder / f"{number}_helix_{m}x{n}", reason)


def a_report(job: SweepJob, tokens_per_s: float) -> Report:
    parallel = job.settings.parallel
    runs = [tokens_per_s * factor for factor in (0.98, 1.0, 1.02)]
    return Report(
        started_at="2026-08-01T12:00:00+00:00",
        method=MethodLabel(
            f"helix_{parallel.m}x{parallel.n}", parallel.m, parallel.n, Schedules("batch"), parallel.data
        ),
        world_size=parallel.ranks,
        model={"name": "dense", "heads": 4},
        hardware={"name": "auto"},
        workload={"name": "small", "batch_size": 4, "seq_len": 32, "iterations": 1},
        precision="32-true",
        seed=0,
        tokens_per_s=summarize(runs),
        step_ms=summarize([128e3 / run for run in runs]),
        comm_ms_per_token=summarize([0.1, 0.11, 0.12]),
        memory_bytes_per_rank=Memory(weights=1000, activations_peak=200, peak=1200, predicted=1000),
        comm_bytes_per_rank_per_step=Traffic({"all_to_all/qkv": 300, "all_gather/out": 100}, {}),
        accuracy=Accuracy("mha_fp32_single", 2e-7),
        settings=digest(job.settings),
        git_commit=None,
    )


def measured(job: SweepJob, tokens_per_s: float) -> SweepJob:
    write(a_report(job, tokens_per_s), job.folder / REPORT)
    return job
