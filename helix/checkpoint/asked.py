"""`ckpt=` of a command, checked before anything is launched: is it whole, and is it of this model? Knows no torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helix.checkpoint.content import About, CheckpointError, Manifest
from helix.checkpoint.manifest import CheckpointWarning, latest, read, verify
from helix.checkpoint.trained import Trained, check_same, trained
from helix.config import environment
from helix.config.check import check
from helix.config.schema import (
    ConfigError,
    InferConfig,
    Misfit,
    ModelConfig,
    ParallelConfig,
    to_grid,
    to_options,
    to_shape,
)
from helix.config.train_schema import TrainConfig, check_training
from helix.partition.function import Function, function_of


def check_inference(settings: InferConfig) -> None:
    """Check a whole configuration, and put the newest whole checkpoint in the place of a folder of them.

    Raises:
        ConfigError, PartitionError: as `helix.config.check.check`.
    """
    check(settings)
    if settings.ckpt is not None:
        settings.ckpt = str(check_checkpoint(settings.ckpt, settings.model, settings.parallel))


def check_resumed_training(settings: TrainConfig) -> None:
    """Check a whole configuration. A folder stays one: a training that is restarted goes on from its newest.

    Raises:
        ConfigError, PartitionError: as `helix.config.train_schema.check_training`.
    """
    check_training(settings)
    if settings.ckpt is not None:
        path, manifest = _whole(settings.ckpt)
        # A single rank, and data replicas, train as grids of Helix's do.
        _check_model(path, manifest, settings.model, settings.parallel, settings.parallel.method != "tensor")
        _check_goes_on(path, manifest.about, settings)


def fixed(settings: TrainConfig) -> dict[str, Any]:
    """By their names in configs, the values that a training keeps to its end: they say which tokens a step sees."""
    data, keys = settings.data, ("path", "limit_bytes", "seq_len", "batch_size", "held_out_every")
    return {
        **{f"data.{key}": getattr(data, key) for key in keys},
        "trainer.accumulate_grad_batches": settings.trainer.accumulate_grad_batches,
        "seed": settings.seed,
    }


def check_checkpoint(ckpt: str, model: ModelConfig, parallel: ParallelConfig) -> Path:
    """Check that there is a whole checkpoint, of this model and what this layout makes of it.

    Args:
        ckpt: one, or a folder of them: its newest whole one. Newer ones that are not whole are named on stderr.

    Returns:
        The checkpoint's path.

    Raises:
        ConfigError: if there is none.
        Misfit: if it is of another model, or was trained as another function; with what to set.
    """
    path, manifest = _whole(ckpt)
    # The other methods make no other function than the exact attention's.
    _check_model(path, manifest, model, parallel, parallel.method == "helix")
    return path


def _check_model(path: Path, manifest: Manifest, model: ModelConfig, parallel: ParallelConfig, helix: bool) -> None:
    """Check the model and its function; `helix` says whether the layout's own options count for that."""
    here, hint = Trained(to_shape(model), _function(parallel) if helix else Function()), ""
    try:
        models = trained(manifest.about)
        if len(models) == 1:  # not of weights that were imported from a file that tells of none
            (there,) = models.values()
            hint = "" if helix or there.function == Function() else " with parallel=helix"
            check_same(there, here, f"ckpt={path}", f"model={model.name} here")
    except CheckpointError as error:
        raise Misfit(f"{error}{hint}") from None


def _check_goes_on(path: Path, about: About, settings: TrainConfig) -> None:
    """Check that the checkpoint is of a training, and that this configuration can be its next piece.

    Raises:
        Misfit: if not, with what to set.
    """
    extra, limits = _dict(about.extra), settings.trainer
    if not about.optimizers or "loops" not in extra:
        raise Misfit(
            f"ckpt={path} holds weights alone, and no training to go on from; give a checkpoint of train.py's, or null"
        )
    kind, name = about.optimizers[0]["type"].lower(), settings.optimizer.name
    if kind != name:
        raise Misfit(f"ckpt={path} has the state of {kind}, and optimizer.name={name} here; set optimizer={kind}")
    saved, here = _dict(_dict(extra.get("module")).get("fixed")), fixed(settings)
    if differing := [key for key in here if key in saved and saved[key] != here[key]]:
        said = " ".join(f"{key}={'null' if saved[key] is None else saved[key]}" for key in differing)
        raise Misfit(f"ckpt={path} was trained with {said}, and a step would see other tokens here; set {said}")
    if about.step >= limits.max_steps:
        raise Misfit(
            f"ckpt={path} has {about.step} steps behind it, and trainer.max_steps={limits.max_steps} counts these; "
            "set a larger trainer.max_steps"
        )
    spent = _dict(_dict(_dict(extra.get("callbacks")).get("Timer")).get("time_elapsed")).get("train")
    if limits.max_time is not None and isinstance(spent, int | float) and spent >= _seconds(limits.max_time):
        raise Misfit(
            f"ckpt={path} has {spent:.0f} s of training behind it, and trainer.max_time={limits.max_time} counts "
            "these; set a longer trainer.max_time, or null"
        )


def _seconds(max_time: str) -> int:
    """Of DD:HH:MM:SS."""
    days, hours, minutes, rest = map(int, max_time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _dict(value: Any) -> Mapping[str, Any]:
    """Of a manifest, which may be a stranger's: no other value has members."""
    return value if isinstance(value, dict) else {}


def _whole(ckpt: str) -> tuple[Path, Manifest]:
    folder = Path(ckpt)
    if not folder.is_dir():
        raise ConfigError(f"ckpt={ckpt} is not a folder; give a checkpoint, a folder of them, or null for none")
    try:
        with warnings.catch_warnings(record=True) as refused:
            warnings.simplefilter("always", CheckpointWarning)
            path = latest(folder)
        if environment.speaks():
            for each in refused:
                print(f"{Path(sys.argv[0]).name}: warning: {each.message}", file=sys.stderr)
        return (path, read(path)) if path is not None else (folder, verify(folder))
    except CheckpointError as error:
        raise ConfigError(f"ckpt={ckpt} cannot be loaded: {error}") from None


def _function(parallel: ParallelConfig) -> Function:
    return function_of(to_options(parallel, parallel.schedule), to_grid(parallel))
