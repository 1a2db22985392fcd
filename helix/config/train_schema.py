"""What `train.py` is told, and everything about it that can be known before anything is launched."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

from helix.config import environment
from helix.config.check import (
    check_batch,
    check_device,
    check_layer,
    check_logger,
    check_model,
    check_placement,
    check_sizes,
    check_started,
    check_text,
    check_values,
)
from helix.config.memory import RANK_BYTES, stored_parameters
from helix.config.schema import (
    ITEMSIZE,
    ConfigError,
    HardwareConfig,
    LoggerConfig,
    Misfit,
    ModelConfig,
    ParallelConfig,
    at_least,
    bounded,
    one_of,
    to_grid,
    to_options,
    to_shape,
)
from helix.partition import rivals
from helix.partition.transformer_cost import TransformerCost

PRECISIONS = (*ITEMSIZE, "bf16-mixed", "16-mixed")
# Lightning's form of a length of time.
_MAX_TIME = r"\d+:\d\d:\d\d:\d\d"


@dataclass
class TrainParallelConfig(ParallelConfig):
    """`ParallelConfig`, and whether the data replicas share the parameters out among themselves (FSDP2)."""

    shard_data: bool = False


@dataclass
class DataConfig:
    """The text, and how much of it a step sees.

    Args:
        path: a file, or a folder of files, whose bytes are the tokens; null means this machine's Python standard
            library.
        limit_bytes: how much of it is read at most.
        seq_len: tokens of one sequence.
        batch_size: sequences of one forward pass over all data replicas; an optimizer step has
            `trainer.accumulate_grad_batches` of them.
        held_out_every: one piece of the text in so many is held out for validation.
        validation_batches: batches of held-out text that one validation takes, or as many as there are.
    """

    name: str = MISSING
    path: str | None = None
    limit_bytes: int = at_least(1)
    seq_len: int = at_least(1)
    batch_size: int = at_least(1)
    held_out_every: int = at_least(2)
    validation_batches: int = at_least(1)


@dataclass
class OptimizerConfig:
    """The optimizer and its learning rate: a linear warm-up to `lr`, then a decay to `lr * final_lr_ratio`.

    `beta1`, `beta2` and `eps` are AdamW's, `momentum` is SGD's. Norms are not decayed by `weight_decay`.
    """

    name: str = one_of("adamw", ("adamw", "sgd"))
    lr: float = bounded(above=0)
    weight_decay: float = bounded(at_least=0)
    beta1: float = bounded(0.9, at_least=0, below=1)
    beta2: float = bounded(0.95, at_least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    momentum: float = bounded(0.9, at_least=0, below=1)
    warmup_steps: int = at_least(0)
    decay: str = one_of("cosine", ("cosine", "none"))
    final_lr_ratio: float = bounded(at_least=0, at_most=1)


@dataclass
class TrainerConfig:
    """How long, and what happens on the way; steps are the optimizer's.

    Args:
        max_steps: steps of the whole training, which the learning rate's decay is laid over.
        max_time: where to stop if that comes first, as DD:HH:MM:SS; it counts over all pieces of a training that
            went on from checkpoints.
        accumulate_grad_batches: batches whose gradients one step sums.
        scaling: how 16-mixed scales the loss, adaptive to the grid or ordinary (`helix.parallel.scaler`).
        gradient_clip_val: largest global norm of the gradients; null for any.
        validate_every_n_steps: steps from one validation to the next; there is one at the end in any case.
        log_every_n_steps: steps from one record of losses to the next; no loss is left out.
        save_every_n_steps: steps from one checkpoint to the next, besides the one at the end; null for none, but
            for the end of a training that goes on from another's.
        keep_checkpoints: how many of them are left; null for all.
    """

    max_steps: int = at_least(1)
    max_time: str | None = None
    accumulate_grad_batches: int = at_least(1)
    scaling: str = one_of("adaptive", ("adaptive", "ordinary"))
    gradient_clip_val: float | None = bounded(above=0)
    validate_every_n_steps: int = at_least(1)
    log_every_n_steps: int = at_least(1)
    save_every_n_steps: int | None = at_least(1, None)
    keep_checkpoints: int | None = at_least(1, 3)


@dataclass
class TrainConfig:
    """Everything that `train.py` is told.

    Args:
        auxiliary_weight: of the experts' load-balancing loss.
        ckpt: a checkpoint, or a folder of them (the newest whole one), that the training goes on from; null to begin.
            What says which tokens a step sees has to be as it was: data.path, limit_bytes, seq_len, batch_size and
            held_out_every, trainer.accumulate_grad_batches, and seed; so have the model, its function and
            optimizer.name. All else may differ, and holds from there on: the grid, the precision, the learning rate
            and its schedule, which is laid over all max_steps.
        max_restarts: how often all ranks are started again after one was killed, to go on from the training's last
            whole checkpoint. A rank that raised an error would raise it again, and is not started again.
        hardware, chosen: as `InferConfig`'s; a training needs its hardware for `parallel=auto` alone.
    """

    REPORT: ClassVar[str] = "train_report.json"
    OBJECTIVE: ClassVar[tuple[str, ...]] = ("validation_bpb",)

    parallel: TrainParallelConfig = MISSING
    model: ModelConfig = MISSING
    hardware: HardwareConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING
    auxiliary_weight: float = bounded(0.01, at_least=0)
    ckpt: str | None = None
    max_restarts: int = at_least(0, 0)
    precision: str = one_of("32-true", PRECISIONS)
    seed: int = at_least(0, 0)
    device: str = one_of("auto", ("auto", "cpu", "cuda"))
    chosen: Any = None


def check_training(settings: TrainConfig) -> None:
    """Check a whole configuration.

    Raises:
        ConfigError: if a value is illegal by itself, or here.
        PartitionError: if values do not fit together. Both are one sentence with the legal choices.
    """
    check_values(settings)
    _check_precision(settings)
    _check_method(settings)
    parallel, data = settings.parallel, settings.data
    check_model(settings.model, parallel)
    check_batch("data.batch_size", data.batch_size, parallel.data)
    # A single rank, and data replicas, train as grids of Helix's, and read what those read.
    laid = parallel if parallel.method == "tensor" else replace(parallel, method="helix")
    check_layer(laid, settings.model, data.batch_size, data.seq_len)
    # How long the standard library's own text is, the run finds out.
    check_enough(data, data.limit_bytes if data.path is None else check_text("data.path", Path(data.path)))
    _check_trainer(settings.trainer, settings.optimizer)
    _check_restarts(settings)
    check_logger(settings.logger)
    local_ranks = check_started(parallel.ranks)
    check_placement(parallel)
    device = check_device(settings.device, local_ranks)
    _check_memory(settings, local_ranks, device)


def check_enough(data: DataConfig, size: int) -> None:
    """Check that a text of `size` bytes can be cut into training text and one batch of validation.

    Raises:
        ConfigError: if it cannot.
    """
    # A window holds one byte more than its sequence, which is the last token's successor.
    needed = data.held_out_every * data.batch_size * (data.seq_len + 1)
    if min(size, data.limit_bytes) < needed:
        raise ConfigError(
            f"the text has {min(size, data.limit_bytes)} bytes, and one in data.held_out_every={data.held_out_every} "
            f"of them has to hold a batch of {data.batch_size} x {data.seq_len} tokens for validation, which takes "
            f"{needed}; take a longer text, or a smaller data.batch_size or data.seq_len"
        )


def _check_precision(settings: TrainConfig) -> None:
    """Check that the optimizer can compute in the dtype of the weights."""
    if settings.precision == "16-true" and settings.optimizer.name == "adamw":
        raise Misfit(
            "precision=16-true keeps the weights in fp16, where AdamW's eps and most squared gradients are 0, and its "
            "first step gives no numbers; choose precision=16-mixed or bf16-true, or optimizer=sgd"
        )


def _check_method(settings: TrainConfig) -> None:
    """Check the sizes that only some methods have, and what a method's way to cut the model needs."""
    parallel, data = settings.parallel, settings.data
    check_sizes(parallel)
    if parallel.method == "tensor":
        shape = to_shape(settings.model)
        for name, only in (("schedule", "auto"), ("aggregate", "project"), ("projection", "column")):
            if getattr(parallel, name) != only:
                raise ConfigError(
                    f"parallel.method=tensor has no parallel.{name}={getattr(parallel, name)}; choose {only}, or "
                    "parallel=helix"
                )
        rivals.check_tensor(shape, parallel.n, data.seq_len if parallel.residual == "sharded" else None)
        check_batch("data.batch_size", data.batch_size, parallel.data)
        if parallel.stage > 1:
            rivals.check_pipeline(shape, parallel.stage, data.batch_size // parallel.data, parallel.microbatches)
    if parallel.method == "data" and settings.model.kind == "moe":
        raise ConfigError(
            "parallel.method=data spreads experts over the replicas, which does not train; for replicas of all "
            f"experts take parallel=helix parallel.m=1 parallel.n=1 parallel.data={parallel.data}, or model=dense"
        )


def _check_trainer(trainer: TrainerConfig, optimizer: OptimizerConfig) -> None:
    if trainer.max_time is not None and not re.fullmatch(_MAX_TIME, trainer.max_time):
        raise ConfigError(
            f"trainer.max_time takes DD:HH:MM:SS, such as 00:00:01:30 for 90 seconds, or null, not {trainer.max_time}"
        )
    if optimizer.warmup_steps > trainer.max_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is more than trainer.max_steps={trainer.max_steps}; "
            "choose at most as many"
        )


def _check_restarts(settings: TrainConfig) -> None:
    """Check that there is something to go on from, and somebody to start the ranks again."""
    if settings.max_restarts == 0:
        return
    launcher = environment.started()
    if launcher is not None:
        raise ConfigError(
            f"max_restarts={settings.max_restarts} is for ranks that train.py forks, and {launcher.by} started these; "
            "take max_restarts=0, and have the launcher start them again (torchrun --max-restarts=2)"
        )
    if settings.trainer.save_every_n_steps is None:
        raise ConfigError(
            f"max_restarts={settings.max_restarts} goes on from the training's own checkpoints, and "
            "trainer.save_every_n_steps=null makes none on the way; choose a number of steps, or max_restarts=0"
        )


def _check_memory(settings: TrainConfig, local_ranks: int, device: str) -> None:
    """Check that this host, and each of its GPUs if the ranks compute there, can hold the training.

    Raises:
        Misfit: with the memory needed and the memory there is.
    """
    model, data, parallel = settings.model, settings.data, settings.parallel
    share = local_ranks / parallel.ranks
    wide = ITEMSIZE.get(settings.precision, 4)
    weights = stored_parameters(model, parallel) * wide * share
    # Weights, their gradients, and two moments, which replicas may share out once each has drawn its weights.
    state = max(4 * weights / (parallel.data if parallel.shard_data else 1), weights)
    if parallel.method == "tensor":  # each rank draws the whole model, then keeps its part
        state = max(state, to_shape(model).parameters() * wide * local_ranks)
    stage = replace(to_shape(model), layers=-(-model.layers // parallel.stage))
    batch = -(-data.batch_size // parallel.data)
    cost = TransformerCost(stage, to_grid(parallel), to_options(parallel, "auto"), batch, data.seq_len, wide)
    held = cost.saved_bytes() * local_ranks
    host = environment.free_memory_bytes()
    if device == "cuda":
        room = environment.free_gpu_memory_bytes()
        where, need, free = "each GPU", (state + held) / local_ranks, host if room is None else room
    else:
        where, need, free = "this machine", state + held + local_ranks * RANK_BYTES, host
    if need > free:
        shards = " parallel.shard_data=true," if parallel.data > 1 and not parallel.shard_data else ""
        raise Misfit(
            f"training model={model.name} needs about {need / 1e9:.1f} GB on {where} (weights, gradients and moments "
            f"{state / 1e9:.1f}, activations {held / 1e9:.1f} over {local_ranks} ranks), and {free / 1e9:.1f} GB are "
            f"available; take{shards} model=tiny, or a smaller data.batch_size or data.seq_len"
        )
