"""The generation that `infer.py model=smollm2 prompt=..` runs: stream an answer, measure, compare, report."""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from helix.config.environment import local_ranks, resolve_device, speaks
from helix.config.folder import shape_of
from helix.config.generation import check_shape, prompts_of, stop_texts
from helix.config.methods import baselines_of, to_name
from helix.config.schema import ITEMSIZE, InferConfig, digest
from helix.flight.activity import enter
from helix.generation.asked import folder_of
from helix.generation.contenders import Contender, Source
from helix.generation.measure import Found, Protocol, measure
from helix.generation.passes import Task
from helix.generation.results import Model, label, measurement, rival
from helix.generation.sampling import ending_texts, ends_of, of_folder, padding
from helix.generation.table import show
from helix.generation.tokens import Prompts, encode, read_tokenizer
from helix.generation.verify import compare, expected
from helix.generation.views import make_printable
from helix.parallel.methods.configured import DTYPES
from helix.pretrained.folder import ONLY_DATA
from helix.ranks.agreement import agree_on
from helix.ranks.launch import launch
from helix.ranks.process_group import hosts, own_device
from helix.study.between import host_ranks
from helix.study.provenance import now
from helix.study.report import (
    NOT_VERIFIED,
    Accuracy,
    Generation,
    Measurement,
    Refusal,
    Report,
    Rival,
    Tracked,
    write,
)
from helix.study.tracking import Tracker, track, tracked_at

# The others wait in a collective while rank 0 answers everything alone; that a rank was killed the launcher sees.
_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True)
class Given:
    """What the launcher has read before it forks the ranks: the model's folder and sizes, tokenizer, prompts."""

    folder: Path
    model: Model
    prompts: Prompts
    tokenizer: Any
    ends: frozenset[int]


def run(settings: InferConfig, run_dir: Path) -> None:
    """Generate what was configured and checked; write report.json and show the table.

    Raises:
        ConfigError, PartitionError, CheckpointError: if the model's files say that it cannot be, before ranks start.
        RankError: if a rank was killed.
    """
    began = now()
    given = read(settings)
    device = resolve_device(settings.device, local_ranks(settings.parallel.ranks))
    parallel, arguments = settings.parallel, (settings, given, run_dir, device, began, time.time())
    reports = launch(
        _rank,
        *arguments,
        ranks=parallel.ranks,
        device=device,
        timeout_s=_TIMEOUT_S,
        placement=parallel.placement,
        slices=parallel.m,
    )
    if reports[0] is not None and speaks():
        make_printable()
        show(reports[0])


def read(settings: InferConfig) -> Given:
    """Find the model, read its sizes and tokenizer, and encode the prompts. No torch computation, no weight."""
    be_quiet()
    folder = folder_of(settings)
    shape = shape_of(folder)
    check_shape(settings.model, shape)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, **ONLY_DATA)
    # One import serves all ranks.
    importlib.import_module(AutoModelForCausalLM._model_mapping[type(config)].__module__)
    importlib.import_module("helix.pretrained.loading")
    if any(each.method == "transformers" for each in baselines_of(settings)):
        importlib.import_module("transformers.distributed")
    tokenizer = read_tokenizer(folder)
    generate, work = settings.generate, settings.workload
    prompts = encode(
        tokenizer, prompts_of(settings), generate.chat, work.batch_size, generate.max_new_tokens, shape.context
    )
    model = Model(shape, prompts, ITEMSIZE[settings.precision])
    ends = ends_of(config, of_folder(folder), tokenizer) | ending_texts(tokenizer, stop_texts(generate))
    return Given(folder, model, prompts, tokenizer, ends)


def be_quiet() -> None:
    """Have transformers ask no hub, and print nothing of its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _rank(
    settings: InferConfig, given: Given, run_dir: Path, device: str, began: str, launched_at: float
) -> Report | None:
    """What each rank does; rank 0 returns the report."""
    agree_on(asdict(settings), run_dir)
    startup_s = time.time() - launched_at
    if dist.get_rank() != 0:
        _gather(*_measure(settings, given, device, Tracker(None, None)))
        return None
    run_dir.mkdir(parents=True, exist_ok=True)
    with track(settings.logger, run_dir, asdict(settings)) as tracker:
        everyone, refusals, accuracies = _gather(*_measure(settings, given, device, tracker))
        main, baselines = _compare(settings, given.model, everyone, refusals, accuracies)
        report = _report(settings, given, began, everyone, main, baselines, tracked_at(tracker, run_dir))
        write(report, run_dir / settings.REPORT)
        tracker.summary(_headline(report) | {"startup_s": startup_s})
    return report


def _measure(
    settings: InferConfig, given: Given, device: str, tracker: Tracker
) -> tuple[dict[str, Found], dict[str, str], dict[str, Accuracy]]:
    """Run the protocol on this rank; rank 0 then compares with transformers alone."""
    enter("load")
    own = own_device(device)
    source = Source(given.folder, DTYPES[settings.precision], own)
    pad = padding(given.tokenizer, given.ends)
    stop = stop_texts(settings.generate)
    task = Task(given.prompts, settings.generate, given.tokenizer, given.ends, pad, stop, settings.seed, own)
    layouts = {to_name(each): each for each in (settings.parallel, *baselines_of(settings))}
    found, refusals, running = measure(Protocol(layouts, settings.workload), source, task, tracker)
    enter("comparison")
    accuracies = _verify(task, source, found, running) if settings.generate.verify else {}
    enter("save")
    return found, refusals, accuracies


def _verify(task: Task, source: Source, found: dict[str, Found], running: dict[str, Contender]) -> dict[str, Accuracy]:
    """On rank 0, every method's answers against one process'; the ranks let go of their models for it."""
    running.clear()
    gc.collect()
    accuracies: dict[str, Accuracy] = {}
    if dist.get_rank() == 0:
        reference = expected(task, source)
        for name, each in found.items():
            assert each.steps is not None
            accuracies[name] = compare(each.tokens, each.steps, reference)
    dist.barrier()
    return accuracies


def _gather(
    found: dict[str, Found], refusals: dict[str, str], accuracies: dict[str, Accuracy]
) -> tuple[list[dict[str, Found]], dict[str, str], dict[str, Accuracy]]:
    """What all ranks found, on rank 0; the others get nothing."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everyone)
    return everyone or [], refusals, accuracies


def _compare(
    settings: InferConfig,
    model: Model,
    everyone: list[dict[str, Found]],
    refusals: dict[str, str],
    accuracies: dict[str, Accuracy],
) -> tuple[Measurement, list[Rival | Refusal]]:
    """The main method's figures, and each baseline's beside it."""
    found: list[Measurement | Refusal] = []
    for parallel in (settings.parallel, *baselines_of(settings)):
        name = to_name(parallel)
        if name in refusals:
            found.append(Refusal(label(parallel, model), refusals[name]))
            continue
        accuracy = accuracies.get(name, Accuracy(NOT_VERIFIED, float("nan")))
        found.append(measurement(parallel, [each[name] for each in everyone], model, accuracy))
    main, *others = found
    assert isinstance(main, Measurement)
    return main, [each if isinstance(each, Refusal) else rival(each, main) for each in others]


def _report(
    settings: InferConfig,
    given: Given,
    began: str,
    everyone: list[dict[str, Found]],
    main: Measurement,
    baselines: list[Rival | Refusal],
    tracked: Tracked | None,
) -> Report:
    own = everyone[0][main.method.name]
    return Report(
        **{name: getattr(main, name) for name in Measurement.__dataclass_fields__},
        started_at=began,
        world_size=len(everyone),
        parallel=asdict(settings.parallel),
        model=asdict(settings.model) | {"family": given.model.shape.family, "folder": str(given.folder)},
        hardware=asdict(settings.hardware),
        workload=asdict(settings.workload),
        precision=settings.precision,
        seed=settings.seed,
        generation=Generation(
            prompt_tokens=[len(each) for each in given.prompts.ids],
            new_tokens=[count for batch in own.counts for count in batch],
            prompts=given.prompts.texts,
            answers=own.texts,
            settings=asdict(settings.generate),
        ),
        baselines=baselines,
        wandb=tracked,
        settings=digest(settings),
        chosen=settings.chosen,
        hosts=host_ranks(hosts()),
    )


def _headline(report: Report) -> dict[str, Any]:
    """The figures of the W&B run's summary, and the answers."""
    figures: dict[str, Any] = {"tokens_per_s/mean": report.tokens_per_s.mean}
    for name in ("ttft_ms", "tpot_ms"):
        if (summary := getattr(report, name)) is not None:
            figures[f"{name}/mean"] = summary.mean
    if (each := report.collectives) is not None:
        figures |= {"collectives/per_step": each.per_step, "collectives/per_layer": each.per_layer}
        for name in ("transfer_us", "wait_us", "share_of_step"):
            figures[f"collectives/{name}/mean"] = getattr(each, name).mean
    if report.accuracy.tokens_equal is not None:
        figures |= {"tokens_equal": report.accuracy.tokens_equal, "relative_error": report.accuracy.relative_error}
    if report.comm_bytes_per_rank_per_step.predicted is not None:
        figures["bytes_agree"] = report.comm_bytes_per_rank_per_step.agrees
    for other in report.baselines:
        if isinstance(other, Rival):
            figures[f"speed_ratio/{other.method.name}"] = other.paired.ratio
    if report.generation is not None:
        figures["answers"] = json.dumps(list(report.generation.answers), ensure_ascii=False)
    return figures
