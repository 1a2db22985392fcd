"""Checkpoints: saved by every rank, whole or not there at all, loaded on any grid.

    save("checkpoints", module, [optimizer], extra={"epoch": 3}, keep=2, step=350)
    extra = load("checkpoints", module, [optimizer])    # the newest whole one; on another grid, too

What a checkpoint is on the disk: `helix.checkpoint.manifest`. Which names and shapes it has: `helix.checkpoint.whole`.
Who writes and reads which part: `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from helix.checkpoint import manifest as files
from helix.checkpoint.agree import from_rank_0, joined, rank, together, told
from helix.checkpoint.content import About, CheckpointError, plain
from helix.checkpoint.manifest import CheckpointWarning, latest, verify
from helix.checkpoint.portable import export, import_
from helix.checkpoint.restoring import choose
from helix.checkpoint.storage import SafetensorsWriter, alone, nested
from helix.checkpoint.whole import elsewhere, groups, state_tensors, trained_in, wholes

__all__ = [
    "BackgroundSaver",
    "CheckpointError",
    "CheckpointWarning",
    "Loaded",
    "Saved",
    "export",
    "import_",
    "latest",
    "load",
    "restore",
    "save",
    "verify",
]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written.

    Args:
        path: its folder.
        nbytes: of its tensors, those of all ranks.
        seconds: from the call until it had its name, as this rank saw it.
        held_s: of these, how long the caller waited.
    """

    path: Path
    nbytes: int
    seconds: float
    held_s: float

    def __str__(self) -> str:
        return f"saved {self.path}: {_rate(self.nbytes, self.seconds)}"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was loaded: `nbytes` is what it holds, of which each rank read its part."""

    path: Path
    step: int
    extra: dict[str, Any]
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return f"loaded {self.path}: {_rate(self.nbytes, self.seconds)}"


def save(
    folder: Path | str,
    module: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    extra: dict[str, Any] | None = None,
    keep: int | None = 3,
    *,
    step: int = 0,
) -> Saved:
    """Write a new checkpoint into `folder`; every rank calls it, on a folder that all of them see.

    Args:
        optimizers: whose state is saved with the module's parameters and persistent buffers.
        extra: plain values (numbers, strings, lists, dicts, None); rank 0's are written.
        keep: how many of the folder's checkpoints are left, this one included; None for all.
        step: optimizer steps so far, for its name.

    Raises:
        CheckpointError: on every rank, if it could not be written; the checkpoints before it are untouched.
    """
    began = time.perf_counter()
    state, writer = _prepare(folder, module, optimizers, extra, keep, step)
    metadata = _finish(lambda: _save(state, writer), writer)
    seconds = time.perf_counter() - began
    return Saved(writer.checkpoint, _nbytes(metadata), seconds, seconds)


class BackgroundSaver:
    """Saves while training goes on: the caller waits for a copy of the state in memory, not for the disk.

    One save is under way at a time; the next waits for it. A process that is killed meanwhile leaves the checkpoints
    before, as with `save`. Made by every rank at the same point: it has a process group of its own (gloo), whose
    collectives cannot meet the training's.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._under_way: Callable[[], Saved] | None = None

    def save(
        self,
        folder: Path | str,
        module: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        extra: dict[str, Any] | None = None,
        keep: int | None = 3,
        *,
        step: int = 0,
    ) -> Saved | None:
        """As the function `save`, in the background; returns what the save before this one was, if there was one.

        Raises:
            CheckpointError: if the save before this one failed, or this one cannot begin.
        """
        done = self.wait()
        began = time.perf_counter()
        state, writer = _prepare(folder, module, optimizers, extra, keep, step)
        if self._group is None:
            # Nothing to save while: DCP would warn, in its thread, that there is one process.
            future: Future[Metadata] = Future()
            future.set_result(_finish(lambda: _save(state, writer), writer))
        else:
            answer = dcp.async_save(nested(state), storage_writer=writer, process_group=self._group)
            assert isinstance(answer, Future)
            future = answer
        held, ended = time.perf_counter() - began, Future[float]()
        future.add_done_callback(lambda _: ended.set_result(time.perf_counter()))

        def finish() -> Saved:
            waited = time.perf_counter()
            metadata = _finish(future.result, writer)
            seconds = ended.result() - began
            return Saved(writer.checkpoint, _nbytes(metadata), seconds, held + time.perf_counter() - waited)

        self._under_way = finish
        return done

    def wait(self) -> Saved | None:
        """Wait for the save that is under way, if any, and return what it was.

        Raises:
            CheckpointError: if it failed.
        """
        finish, self._under_way = self._under_way, None
        return finish() if finish is not None else None


def load(checkpoint: Path | str, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> dict[str, Any]:
    """`restore`, for its `extra` alone."""
    return restore(checkpoint, module, optimizers).extra


def restore(checkpoint: Path | str, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Loaded:
    """Load a checkpoint into a module, and its optimizers' state; every rank calls it, of any grid.

    Every file is checked first, each by one rank. A module may be a part of the one that was saved, such as the
    model of a LightningModule: names are then found under the prefix that fits all of them. Parameters keep their
    own dtype. A `Transformer` that would make another function of the weights is refused; see `trained`.

    Args:
        checkpoint: one checkpoint, or a folder of them: its newest whole one. Of each newer one that is not whole,
            rank 0 warns (CheckpointWarning).
        optimizers: those of the module, in the order in which they were saved; none to load weights only.

    Raises:
        CheckpointError: on every rank, if there is no whole one, or it does not fit the module or the optimizers.
    """
    began = time.perf_counter()
    opened = choose(Path(checkpoint))
    together(lambda: opened.fill(module, optimizers))
    about, seconds = opened.manifest.about, time.perf_counter() - began
    return Loaded(opened.path, about.step, about.extra, opened.manifest.nbytes, seconds)


def _prepare(
    folder: Path | str,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    extra: dict[str, Any] | None,
    keep: int | None,
    step: int,
) -> tuple[dict[str, Tensor], SafetensorsWriter]:
    """What is saved, by name, and the writer of a checkpoint whose path all ranks agree on."""
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep={keep} would remove the checkpoint that is being saved; keep at least 1, or None")
    found = wholes(module)
    state = {name: whole.gather(whole.parts) for name, whole in found.items()}
    models = {name: each.plain() for name, each in trained_in(module).items()}
    about = About(step, plain(extra or {}, "extra"), models=models)
    for index, optimizer in enumerate(optimizers):
        state |= state_tensors(found, optimizer)
        listed = groups(found, optimizer)
        if elsewhere(module):
            everyones = joined([group["params"] for group in listed])
            listed = [group | {"params": names} for group, names in zip(listed, everyones, strict=True)]
        own = {"type": type(optimizer).__name__, "groups": listed}
        about.optimizers.append(plain(own, f"optimizers[{index}]"))
    path = from_rank_0(lambda: files.next_path(Path(folder), step))
    return state, SafetensorsWriter(path, about, keep)


def _save(state: dict[str, Tensor], writer: SafetensorsWriter) -> Metadata:
    if dist.is_initialized():
        return dcp.save(nested(state), storage_writer=writer)
    with alone():
        return dcp.save(nested(state), storage_writer=writer, no_dist=True)


def _finish(fn: Callable[[], Metadata], writer: SafetensorsWriter) -> Metadata:
    """`fn()`, which saves; if that fails on any rank, the draft is removed, so that a full disk is not fuller."""
    try:
        return told(fn, writer.checkpoint)
    except CheckpointError:
        if rank() == 0:  # every rank has stopped writing: DCP gathers their failures
            shutil.rmtree(writer.draft, ignore_errors=True)
        raise


def _nbytes(metadata: Metadata) -> int:
    """Bytes of the tensors."""
    total = 0
    for tensor in metadata.state_dict_metadata.values():
        if isinstance(tensor, dcp.TensorStorageMetadata):
            total += tensor.size.numel() * torch.empty((), dtype=tensor.properties.dtype).element_size()
    return total


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / 1e6:.1f} MB in {seconds:.2f} s ({nbytes / 1e6 / max(seconds, 1e-9):.0f} MB/s)"
