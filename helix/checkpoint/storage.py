"""Storage for `torch.distributed.checkpoint`: one safetensors file a rank, checksums, a rename when all is there.

DCP plans (which rank writes which box of which tensor, once, and which boxes a rank on another grid reads) and
carries the plans between the ranks; what is on the disk is `helix.checkpoint.manifest`'s. Its own two storages were
looked at and not taken: FileSystemWriter keeps the places of tensors in a pickle, and HuggingFaceStorageWriter has
no checksums, loses a rank's second box of one tensor, and leaves no place where the whole is known to be written.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from helix.checkpoint import manifest as files
from helix.checkpoint.agree import told
from helix.checkpoint.content import DTYPE_BYTES, About, CheckpointError, Chunk, Entry, Manifest, Sum

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}


_TOP = "all"


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What DCP is given: it looks at each key of the top for a `state_dict` and logs that, which takes a third of a
    save's time with a key for each tensor; what is below one key it takes as it is."""
    return {_TOP: tensors}


def _own_name(fqn: str) -> str:
    return fqn.removeprefix(f"{_TOP}.")


@dataclass(frozen=True)
class _Written:
    """A chunk that a rank wrote, and its file's checksum."""

    chunk: Chunk
    file: Sum


class SafetensorsWriter(StorageWriter):
    """Writes `checkpoint` as a draft; rank 0, once all have written, adds the manifest and gives it its name.

    Args:
        checkpoint: a path that does not exist, beside the folder's other checkpoints; the same on all ranks.
        about: what else it holds; rank 0's is written.
        keep: how many checkpoints of the folder are left when it is there; None for all.
    """

    def __init__(self, checkpoint: Path, about: About, keep: int | None = None) -> None:
        self.checkpoint, self.about, self.keep = checkpoint, about, keep
        self.draft = files.draft(checkpoint)
        self.rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next: each has its own writer."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.draft.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"rank-{self.rank:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        chunks: dict[MetadataIndex, Chunk] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            box = item.tensor_data.chunk
            if not prod(box.sizes):  # of a dim with fewer entries than ranks
                continue
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            chunk = Chunk(name, tuple(box.offsets), tuple(box.sizes))
            tensors[chunk.key(_own_name(item.index.fqn))] = _owned(tensor)
            chunks[item.index] = chunk
        results = []
        if tensors:
            written = _write(tensors, self.draft / name)
            results = [
                WriteResult(index, prod(chunk.shape), _Written(chunk, written)) for index, chunk in chunks.items()
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        sums = {}
        for result in (result for each in results for result in each):
            written: _Written = result.storage_data
            chunks[_own_name(result.index.fqn)].append(written.chunk)
            sums[written.chunk.file] = written.file
        for name, expected in sums.items():
            path = self.draft / name
            if not path.is_file() or path.stat().st_size != expected.nbytes:
                raise CheckpointError(f"{path} was written by another host, and rank 0 needs a folder that all share")
        wholes = {_own_name(fqn): whole for fqn, whole in metadata.state_dict_metadata.items()}
        tensors = {name: _entry(whole, name, chunks[name]) for name, whole in sorted(wholes.items())}
        files.write(Manifest(tensors, sums, self.about), self.draft)
        files.publish(self.checkpoint, self.keep)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class SafetensorsReader(StorageReader):
    """Reads the boxes that a rank needs, and no more, of a checkpoint whose files have been checked.

    Args:
        entries: the tensors that are wanted, by name.
    """

    def __init__(self, checkpoint: Path, entries: dict[str, Entry]) -> None:
        self.checkpoint, self.entries = checkpoint, entries

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next: each has its own reader."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, STORAGE_TYPES] = {}
        for name, entry in self.entries.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in entry.chunks]
            properties = TensorProperties(dtype=DTYPES[entry.dtype])
            tensors[f"{_TOP}.{name}"] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All is in the manifest."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks = {
            MetadataIndex(f"{_TOP}.{name}", chunk.offset): chunk
            for name, entry in self.entries.items()
            for chunk in entry.chunks
        }
        wanted: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            chunk = chunks[item.storage_index]
            wanted[chunk.file].append((chunk, item))
        for name, items in wanted.items():
            with safe_open(self.checkpoint / name, framework="pt") as file:
                for chunk, item in items:
                    _read(file, chunk.key(_own_name(item.storage_index.fqn)), item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def write_alone(checkpoint: Path, tensors: dict[str, Tensor], about: About) -> None:
    """Write a checkpoint of plain tensors by this process alone."""
    with alone():
        writer = SafetensorsWriter(checkpoint, about)
        told(lambda: dcp.save(nested(tensors), storage_writer=writer, no_dist=True), checkpoint)


def read_alone(checkpoint: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place with what this process holds of them, by this process alone."""
    with alone():
        reader = SafetensorsReader(checkpoint, {name: manifest.tensors[name] for name in tensors})
        told(lambda: dcp.load(nested(tensors), storage_reader=reader, no_dist=True), checkpoint)


@contextmanager
def alone() -> Iterator[None]:
    """DCP warns of what is meant here: that it works for one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _read(file: Any, key: str, item: ReadItem, planner: LoadPlanner) -> None:
    """Copy one box of a file's tensor to where the planner wants it, in that tensor's dtype."""
    if len(item.lengths):
        box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
        source = file.get_slice(key)[box]
    else:
        source = file.get_tensor(key)
    target = planner.resolve_tensor(item).detach()
    if target.shape != source.shape:
        raise CheckpointError(f"{key} is {list(source.shape)} in its file, where {list(target.shape)} are wanted")
    target.copy_(source)
    planner.commit_tensor(item, target)


def _write(tensors: dict[str, Tensor], path: Path) -> Sum:
    """Write a file; it is on the disk when this returns. Its checksum is of what can be read of it."""
    save_file(tensors, path)
    with ThreadPoolExecutor(1) as disk:  # which takes its time while the checksum is computed
        on_disk = disk.submit(files.sync, path)
        found = Sum(files.sha256(path), path.stat().st_size)
        on_disk.result()
    return found


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and with a storage of its own, as safetensors asks."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _entry(whole: STORAGE_TYPES, name: str, chunks: list[Chunk]) -> Entry:
    assert isinstance(whole, TensorStorageMetadata)
    dtype = str(whole.properties.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is of dtype {dtype}, and a checkpoint holds: {', '.join(DTYPES)}")
    return Entry(dtype, tuple(whole.size), tuple(chunks))
