"""Whole weights to and from one safetensors file, in one process: no ranks, no grid.

Export, import and export again give the same file, byte for byte: names, shapes, dtypes and values are in it, in
safetensors' own order, and which model they are of, in its metadata. The optimizers' state stays behind.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from helix.checkpoint import manifest as files
from helix.checkpoint.agree import sentence
from helix.checkpoint.content import About, CheckpointError
from helix.checkpoint.storage import DTYPES, read_alone, write_alone
from helix.checkpoint.trained import trained
from helix.checkpoint.whole import STATE


def export(checkpoint: Path | str, file: Path | str) -> int:
    """Write a checkpoint's parameters and buffers to one safetensors file.

    Args:
        checkpoint: one, or a folder of them: its newest whole one.
        file: replaced if it exists, once all of the new one is written.

    Returns:
        The file's bytes.

    Raises:
        CheckpointError: if the checkpoint is not whole, or the file cannot be written.
    """
    checkpoint, file = Path(checkpoint), Path(file)
    if files.checkpoints(checkpoint):
        newest = files.latest(checkpoint)
        assert newest is not None
        checkpoint = newest
    manifest = files.verify(checkpoint)
    tensors = {
        name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for name, entry in manifest.tensors.items()
        if not name.startswith(STATE)
    }
    read_alone(checkpoint, manifest, tensors)
    draft = file.with_name(f".{file.name}.partial")
    try:
        save_file(tensors, draft, metadata=_metadata(manifest.about))
        files.sync(draft)
        os.replace(draft, file)
        files.sync(file.absolute().parent)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise CheckpointError(f"{file} cannot be written: {sentence(error)}") from None
    return file.stat().st_size


def import_(file: Path | str, checkpoint: Path | str) -> int:
    """Make a checkpoint of one safetensors file's tensors, to load on any grid.

    Returns:
        The tensors' bytes.

    Raises:
        CheckpointError: if the file is not one of safetensors, or there is something at the checkpoint's path.
    """
    file, checkpoint = Path(file), Path(checkpoint)
    if checkpoint.exists():
        raise CheckpointError(f"{checkpoint} exists; give a path that does not")
    try:
        tensors, models = load_file(file), _models(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist; give a safetensors file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {sentence(error)}") from None
    for name, tensor in tensors.items():
        if name.startswith(STATE) or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{file} has {name} of {tensor.dtype}, and a checkpoint's weights are: {', '.join(DTYPES)}"
            )
    try:
        write_alone(checkpoint, tensors, About(models=models))
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be written: {sentence(error)}") from None
    return sum(tensor.nbytes for tensor in tensors.values())


def _metadata(about: About) -> dict[str, str]:
    # Of one key: safetensors writes several in an order that changes from one process to the next.
    return {"helix": json.dumps(about.models, sort_keys=True)} if about.models else {"format": "pt"}


def _models(file: Path) -> dict[str, dict[str, Any]]:
    """What the file says of the models that its weights are of, which may be nothing.

    Raises:
        CheckpointError: if that makes no sense.
    """
    with safe_open(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get("helix", "{}")
    try:
        models: dict[str, dict[str, Any]] = json.loads(said)
        trained(About(models=models))
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: its metadata make no sense ({error})"
        ) from None
    return models
