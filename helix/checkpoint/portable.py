"""Whole weights to and from one safetensors file, in one process: no ranks, no grid.

Export, import and export again give the same file, byte for byte: names, shapes, dtypes and values are all that is
in it, in safetensors' own order. The optimizers' state stays behind.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helix.checkpoint import manifest as files
from helix.checkpoint.agree import sentence
from helix.checkpoint.manifest import About, CheckpointError
from helix.checkpoint.storage import DTYPES, dtype_of, read_alone, write_alone
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
        name: torch.empty(entry.shape, dtype=dtype_of(entry, name))
        for name, entry in manifest.tensors.items()
        if not name.startswith(STATE)
    }
    read_alone(checkpoint, manifest, tensors)
    draft = file.with_name(f".{file.name}.partial")
    try:
        save_file(tensors, draft, metadata={"format": "pt"})
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
        tensors = load_file(file)
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
        write_alone(checkpoint, tensors, About())
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be written: {sentence(error)}") from None
    return sum(tensor.nbytes for tensor in tensors.values())
