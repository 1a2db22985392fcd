"""`ckpt=` of a command, checked before anything is launched: is it whole, and is it of this model? Knows no torch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from helix.checkpoint.content import CheckpointError, Manifest
from helix.checkpoint.manifest import CheckpointWarning, latest, read, verify
from helix.checkpoint.trained import Trained, check_same, trained
from helix.config import environment
from helix.config.check import check
from helix.config.schema import ConfigError, InferConfig, Misfit, ModelConfig, ParallelConfig, to_grid, to_shape
from helix.config.train_schema import TrainConfig, check_training
from helix.partition.function import Function, function_of
from helix.partition.options import AttentionOptions


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
        check_checkpoint(settings.ckpt, settings.model, settings.parallel)


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
    helix = parallel.method == "helix"  # the other methods make no other function than the exact attention's
    here = Trained(to_shape(model), _function(parallel) if helix else Function())
    try:
        models = trained(manifest.about)
        if len(models) == 1:  # not of weights that were imported from a file that tells of none
            (there,) = models.values()
            check_same(there, here, f"ckpt={path}", f"model={model.name} here")
    except CheckpointError as error:
        hint = "" if helix or there.function == Function() else " with parallel=helix"
        raise Misfit(f"{error}{hint}") from None
    return path


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
    options = AttentionOptions(
        parallel.schedule, parallel.aggregate, parallel.concat, parallel.projection, parallel.residual
    )
    return function_of(options, to_grid(parallel))
