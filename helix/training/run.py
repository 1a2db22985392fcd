"""The training that `train.py` runs: Lightning's loop over HelixStrategy, its curves, its report."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from helix.checkpoint.agree import from_rank_0
from helix.config.environment import local_ranks, resolve_device, speaks
from helix.config.methods import to_name
from helix.config.schema import ITEMSIZE, digest, to_grid, to_options, to_shape
from helix.config.train_schema import TrainConfig, check_enough
from helix.flight import ring
from helix.flight.activity import enter
from helix.parallel.checkpoint_callback import HelixCheckpoints
from helix.parallel.strategy import HelixStrategy
from helix.partition.cost import cheapest_schedule
from helix.partition.options import AttentionOptions
from helix.ranks.agreement import agree_on
from helix.ranks.launch import launch
from helix.ranks.process_group import hosts
from helix.study.between import host_ranks
from helix.study.failing import forget
from helix.study.provenance import now
from helix.study.report import MethodLabel, Schedules, Tracked
from helix.study.text import TrainingText, corpus, describe, unigram_entropy
from helix.study.tracking import Tracker, track, tracked_at
from helix.training.curves import Bar, Curves
from helix.training.learner import LanguageModel, TrainingBatches, ValidationBatches
from helix.training.report import TrainReport, Validation, draw, show, write
from helix.training.resuming import Beginning, Resumed, Resumptions, begin


def run(settings: TrainConfig, run_dir: Path) -> None:
    """Train what was configured and checked; write train_report.json, draw curves.png and show the table.

    Raises:
        ConfigError: if the text is too short.
        RankError: if a rank was killed, and `max_restarts` are used up.
    """
    began = now()
    text = corpus(settings.data.path, settings.data.limit_bytes)
    check_enough(settings.data, len(text))
    device = resolve_device(settings.device, local_ranks(settings.parallel.ranks))
    if settings.model.experts:
        from helix.models.experts import load_deepspeed

        load_deepspeed(device)  # before the ranks are forked, so that they share it
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    reports = launch(
        _rank, settings, run_dir, device, began, text,
        ranks=settings.parallel.ranks, device=device, max_restarts=settings.max_restarts,
        placement=settings.parallel.placement, slices=settings.parallel.m,
    )  # fmt: skip
    report = reports[0]
    if report is not None and speaks():
        show(report)


def _rank(settings: TrainConfig, run_dir: Path, device: str, began: str, text: bytes) -> TrainReport | None:
    """What each rank does; rank 0 returns the report."""
    agree_on(asdict(settings), run_dir)
    beginning = begin(settings, run_dir)
    again = beginning.restart is not None
    if again:  # on rank 0 alone, and before any rank can fail in this start
        from_rank_0(partial(forget, beginning.run_dir))
    ring.keep_in(beginning.run_dir)  # of the first start, if the ranks were started again
    if dist.get_rank() != 0:
        train(settings, device, text, Tracker(None, None), beginning)
        return None
    run_dir = beginning.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with track(settings.logger, run_dir, asdict(settings), again) as tracker:
        trained = train(settings, device, text, tracker, beginning)
        report = _report(settings, began, text, trained, tracked_at(tracker, run_dir))
        write(report, run_dir / settings.REPORT)
        draw(report, run_dir / "curves.png")
        tracker.summary({"validation_bpb": report.validation_bpb, "tokens_per_s": report.tokens_per_s})
    return report


@dataclass(frozen=True)
class Trained:
    """What a training leaves on a rank.

    Args:
        wall_s: of the Trainer's fit in this start of the ranks; see `TrainReport`.
        resumed: where it went on from.
    """

    module: LanguageModel
    curves: Curves
    wall_s: float
    resumed: list[Resumed]


def train(settings: TrainConfig, device: str, text: bytes, tracker: Tracker, beginning: Beginning) -> Trained:
    """Train on the ranks that are running, as `begin` says."""
    enter("load")
    parallel, data, limits = settings.parallel, settings.data, settings.trainer
    module = LanguageModel(settings, resolve(settings))
    windows = TrainingText(text, data.batch_size, data.seq_len, settings.seed, data.held_out_every)
    curves = Curves(settings, tracker)
    saves: HelixCheckpoints | None = None
    if limits.save_every_n_steps is not None or beginning.source is not None:
        saves = HelixCheckpoints(
            beginning.checkpoints, limits.save_every_n_steps, limits.keep_checkpoints, resume=beginning.source
        )
    resumptions = Resumptions(beginning, saves)
    # A save comes before the curves start the clock of the next batch.
    callbacks: list[Callback] = [*([saves] if saves else []), resumptions, curves, Bar(settings, curves)]
    local = local_ranks(dist.get_world_size())
    trainer = Trainer(
        strategy=HelixStrategy(
            to_grid(parallel),
            parallel.data,
            parallel.stage,
            precision=settings.precision,
            shard_data=parallel.shard_data,
            scaling=limits.scaling,
        ),
        accelerator=device,
        devices=local,
        num_nodes=dist.get_world_size() // local,
        callbacks=callbacks,
        max_steps=limits.max_steps,
        max_time=limits.max_time,
        accumulate_grad_batches=limits.accumulate_grad_batches,
        gradient_clip_val=limits.gradient_clip_val,
        val_check_interval=limits.validate_every_n_steps * limits.accumulate_grad_batches,
        check_val_every_n_epoch=None,  # there are no epochs: samples are drawn at random
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    start = time.monotonic()
    trainer.fit(module, TrainingBatches(windows, module), ValidationBatches(windows, module))
    enter("save")
    return Trained(module, curves, time.monotonic() - start, resumptions.pieces)


def resolve(settings: TrainConfig) -> AttentionOptions:
    """The layers' options, with `schedule=auto` resolved for this batch and length; tensor parallelism has none."""
    model, parallel, data = settings.model, settings.parallel, settings.data
    schedule = parallel.schedule
    if schedule == "auto" and parallel.method != "tensor":
        itemsize = ITEMSIZE.get(settings.precision, 2)  # a mixed precision's activations are of the narrow one
        batch = data.batch_size // parallel.data
        layout, grid = to_shape(model).layout, to_grid(parallel)
        schedule = cheapest_schedule(layout, grid, batch, data.seq_len, model.causal, itemsize)
    return to_options(parallel, schedule)


def _report(
    settings: TrainConfig,
    began: str,
    text: bytes,
    trained: Trained,
    tracked: Tracked | None,
) -> TrainReport:
    parallel, curves, options = settings.parallel, trained.curves, trained.module.options
    schedules = Schedules(None if parallel.method == "tensor" else options.schedule)
    validations = [Validation(step, bits) for step, bits in curves.validations]
    return TrainReport(
        method=MethodLabel(to_name(parallel), parallel.m, parallel.n, schedules, parallel.data, parallel.stage),
        world_size=dist.get_world_size(),
        started_at=began,
        steps=len(curves.losses),
        losses=curves.losses,
        learning_rates=curves.learning_rates,
        gradient_norms=curves.gradient_norms,
        loss_scales=curves.loss_scales,
        skipped_steps=curves.skipped_steps,
        validations=validations,
        validation_bpb=validations[-1].bpb if validations else float("nan"),
        unigram_entropy_bpb=unigram_entropy(text),
        text=describe(settings.data.path),
        text_bytes=len(text),
        tokens_per_s=curves.tokens_per_s,
        wall_s=trained.wall_s,
        resumed=trained.resumed,
        parameters=to_shape(settings.model).parameters(
            options.aggregate == "project", parallel.m * parallel.n if options.projection == "block" else 1
        ),
        model=asdict(settings.model),
        data=asdict(settings.data),
        optimizer=asdict(settings.optimizer),
        trainer=asdict(settings.trainer),
        auxiliary_weight=settings.auxiliary_weight,
        precision=settings.precision,
        seed=settings.seed,
        settings=digest(settings),
        chosen=settings.chosen,
        wandb=tracked,
        hosts=host_ranks(hosts()),
    )
