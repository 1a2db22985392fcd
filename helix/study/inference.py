"""The inference benchmark that `infer.py` runs: measure, compare with the reference, report.

Protocol (papers, "Measurement Methodology"): `runs` runs of `warmup` untimed and `iterations` timed steps each, of
the main method and of each baseline in turn (`helix.study.turns`). All runs share one launch and one set of
weights; each has tokens and a warm-up of its own, and the interval is taken over the runs' means. A step is one
forward pass of the whole model over one batch; ranks start it together, and it lasts until the last one is done.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from helix.checkpoint.agree import from_rank_0
from helix.checkpoint.restoring import open_checked
from helix.config.environment import local_ranks, resolve_device, speaks
from helix.config.methods import baselines_of, to_name
from helix.config.schema import InferConfig, ParallelConfig, digest, to_grid, to_shape
from helix.flight.activity import enter
from helix.parallel.methods.build import load
from helix.parallel.methods.configured import DTYPES, resolve
from helix.parallel.methods.method import Job
from helix.parallel.strategy import HelixStrategy
from helix.ranks.agreement import agree_on
from helix.ranks.hosts import own_host
from helix.ranks.launch import launch
from helix.ranks.process_group import hosts, own_device
from helix.study.between import host_ranks
from helix.study.measure import BenchmarkModule, Stopwatch, turn_loader
from helix.study.profile import profiled
from helix.study.provenance import now
from helix.study.report import Checkpoint, Measurement, Refusal, Report, Rival, Tracked, write
from helix.study.results import RankResult, describe, measurement, rival
from helix.study.table import show
from helix.study.text import byte_batches, corpus
from helix.study.tracking import Tracker, track, tracked_at

# Different batches of text are cycled through, so that a long protocol does not hold all of its tokens at once.
DISTINCT_BATCHES = 64
# What one rank found: its figures by method, and the refusals of the others.
Found = tuple[dict[str, RankResult], dict[str, str]]


def run(settings: InferConfig, run_dir: Path) -> None:
    """Run the benchmark that was configured and checked; write report.json and show the table.

    Raises:
        RankError: if a rank was killed.
    """
    began = now()
    device = resolve_device(settings.device, local_ranks(settings.parallel.ranks))
    load({each.method for each in _methods(settings)}, settings.model.experts > 0, device)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parallel, arguments = settings.parallel, (settings, run_dir, device, began, time.time())
    measured = launch(
        _rank,
        *arguments,
        ranks=parallel.ranks,
        device=device,
        placement=parallel.placement,
        slices=parallel.m,
    )
    report = measured[0]
    if report is not None and speaks():
        show(report)


def _rank(settings: InferConfig, run_dir: Path, device: str, began: str, launched_at: float) -> Report | None:
    """What each rank does; rank 0 returns the report."""
    agree_on(asdict(settings), run_dir)
    startup_s = _slowest(time.time() - launched_at)
    if dist.get_rank() != 0:
        _gather(_measure(settings, device, Tracker(None, None), run_dir))
        return None
    run_dir.mkdir(parents=True, exist_ok=True)
    with track(settings.logger, run_dir, asdict(settings)) as tracker:
        everyone = _gather(_measure(settings, device, tracker, run_dir))
        report = _report(settings, began, everyone, tracked_at(tracker, run_dir))
        write(report, run_dir / "report.json")
        tracker.summary(_headline(report) | {"startup_s": startup_s})
    return report


def _measure(settings: InferConfig, device: str, tracker: Tracker, run_dir: Path) -> Found:
    """Run the protocol on this rank."""
    enter("load")
    parallel, work = settings.parallel, settings.workload
    job = _job(settings, own_device(device))
    layouts = {to_name(each): (each.method, resolve(settings, each)) for each in _methods(settings)}
    module = BenchmarkModule(layouts, job, _tokens(settings))
    watch = Stopwatch(work, tracker)
    local = local_ranks(dist.get_world_size())
    trainer = Trainer(
        strategy=HelixStrategy(to_grid(parallel), parallel.data, parallel.stage),
        accelerator=device,
        devices=local,
        num_nodes=dist.get_world_size() // local,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.predict(module, turn_loader(module, work), return_predictions=False)
    if settings.profile:
        enter("profile")
        tokens = module.batches[0].to(job.device)
        for name, method in module.methods.items():
            with torch.inference_mode():
                profiled(partial(method.step, tokens), run_dir / "traces" / name, job.device)
    host = own_host()
    enter("save")
    found = {name: RankResult(host, trial, watch.measured[name]) for name, trial in module.trials.items()}
    return found, module.refusals


def _methods(settings: InferConfig) -> list[ParallelConfig]:
    """The main method and its baselines."""
    return [settings.parallel, *baselines_of(settings)]


def _job(settings: InferConfig, device: torch.device) -> Job:
    work = settings.workload
    dtype = DTYPES[settings.precision]
    weights = None if settings.ckpt is None else from_rank_0(partial(open_checked, settings.ckpt))
    return Job(to_shape(settings.model), work.batch_size, work.seq_len, dtype, device, settings.seed, weights)


def _tokens(settings: InferConfig) -> torch.Tensor:
    """Batches of bytes of a real text: [batches, batch_size, seq_len], the same on every rank."""
    work = settings.workload
    passes = work.runs * (work.warmup + work.iterations + 1)
    batches = byte_batches(
        corpus(work.text), work.batch_size, work.seq_len, min(passes, DISTINCT_BATCHES), settings.seed
    )
    return torch.from_numpy(batches)


def _slowest(seconds: float) -> float:
    times: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(times, seconds)
    return max(times)


def _gather(found: Found) -> list[Found]:
    """What all ranks found, on rank 0; the others get nothing."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everyone)
    return everyone or []


def _report(settings: InferConfig, began: str, everyone: list[Found], tracked: Tracked | None) -> Report:
    main, baselines = _compare(settings, everyone)
    checkpoint = None
    if settings.ckpt is not None:
        checkpoint = Checkpoint(settings.ckpt, open_checked(settings.ckpt).manifest.about.step)
    figures = {name: getattr(main, name) for name in Measurement.__dataclass_fields__}
    return Report(
        **figures,
        started_at=began,
        world_size=len(everyone),
        parallel=asdict(settings.parallel),
        model=asdict(settings.model),
        hardware=asdict(settings.hardware),
        workload=asdict(settings.workload),
        precision=settings.precision,
        seed=settings.seed,
        checkpoint=checkpoint,
        baselines=baselines,
        wandb=tracked,
        settings=digest(settings),
        chosen=settings.chosen,
        hosts=host_ranks(hosts()),
    )


def _compare(settings: InferConfig, everyone: list[Found]) -> tuple[Measurement, list[Rival | Refusal]]:
    """The main method's figures, and each baseline's beside it."""
    tokens = settings.workload.batch_size * settings.workload.seq_len
    refusals = everyone[0][1]
    found: list[Measurement | Refusal] = []
    for parallel in _methods(settings):
        method = describe(parallel, resolve(settings, parallel))
        if method.name in refusals:
            found.append(Refusal(method, refusals[method.name]))
        else:
            found.append(measurement(method, [figures[method.name] for figures, _ in everyone], tokens, hosts()))
    main, *others = found
    assert isinstance(main, Measurement)
    return main, [each if isinstance(each, Refusal) else rival(each, main) for each in others]


def _headline(report: Report) -> dict[str, float | bool]:
    """The figures of the W&B run's summary."""
    figures: dict[str, float | bool] = {
        "tokens_per_s/mean": report.tokens_per_s.mean,
        "step_ms/mean": report.step_ms.mean,
        "relative_error": report.accuracy.relative_error,
    }
    if report.comm_bytes_per_rank_per_step.predicted is not None:
        figures["bytes_agree"] = report.comm_bytes_per_rank_per_step.agrees
    if report.comm_ms_per_token is not None:
        figures["comm_ms_per_token/mean"] = report.comm_ms_per_token.mean
    for each in report.baselines:
        if isinstance(each, Rival):
            figures[f"speed_ratio/{each.method.name}"] = each.paired.ratio
    return figures
