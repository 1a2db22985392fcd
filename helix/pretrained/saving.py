"""Saving a partitioned model as an ordinary Hugging Face folder, for any program that reads one.

Rank 0 writes what the ranks send it, a few rows of one tensor at a time, so that no rank ever holds the whole model;
one writer needs no file system that all hosts share. The files are those that `save_pretrained` of the whole model
would write, byte for byte: its names (one tensor an expert, as the hub has Mixtral's), its order, its shards.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from helix.checkpoint import manifest as disk
from helix.checkpoint.agree import from_rank_0, sentence, together
from helix.checkpoint.content import CheckpointError
from helix.comm.mesh import Axis, Mesh
from helix.pretrained.cuts import Cut, cuts
from helix.pretrained.loading import ties
from helix.pretrained.names import Source, sources
from helix.pretrained.structure import mesh_of
from helix.pretrained.writing import Writer

BLOCK = 2 << 20  # bytes that rank 0 receives at a time, of all ranks together; more is no faster
# What a tokenizer is saved as, by the names and the endings that transformers gives the files.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


@dataclass(frozen=True)
class _Matrix:
    """A tensor whose rows lie together in one stored tensor, or in several one after the other.

    Args:
        part: the rank's.
        shape: of the whole.
        cuts: every rank's; none if each holds it whole.
        places: (key, rows) of the stored tensors.
    """

    part: Tensor
    shape: tuple[int, ...]
    cuts: list[Cut]
    places: list[tuple[str, int]]


def save(model: PreTrainedModel, folder: Path | str, max_shard_size: int | str = "5GB") -> None:
    """Write a partitioned model to a new folder: config.json, generation_config.json, safetensors, its tokenizer.

    Every rank of its mesh calls it. The folder has its name only when all of it is on the disk; a save that fails
    leaves nothing, one that is killed a hidden folder beside it that the next save removes.

    Args:
        folder: that does not exist, or is empty.
        max_shard_size: of one safetensors file, bytes or as "500MB"; a bigger model gets several and an index.

    Raises:
        CheckpointError: if it cannot be written, on every rank.
    """
    folder, mesh = Path(folder).absolute(), mesh_of(model)
    whole = together(lambda: _whole(model))
    tensors, stored, found = together(lambda: _plan(model, whole, mesh))
    begun: list[Writer] = []  # on rank 0
    from_rank_0(lambda: begun.append(_begin(folder, model, whole, stored, max_shard_size)))
    writer = begun[0] if begun else None
    try:
        if mesh.data.rank == 0:
            everyones = [cuts(whole, mesh.grid, rank) for rank in range(mesh.grid.ranks)]
            desk = _Desk(mesh.device_type)
            for matrix in _matrices(tensors, stored, found, everyones):
                _send(matrix, mesh.model, writer, desk)
        from_rank_0(lambda: _finish(writer, folder))
    finally:
        if writer is not None:
            writer.discard()  # which a folder that has its name is not


def _begin(
    folder: Path,
    model: PreTrainedModel,
    whole: PreTrainedModel,
    stored: dict[str, Tensor],
    max_shard_size: int | str,
) -> Writer:
    """Rank 0's draft, with all but the weights."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists; give a folder that does not, or an empty one")
    writer = Writer(disk.draft(folder))
    try:
        writer.create(stored, max_shard_size, whole.num_parameters())
        whole.config.save_pretrained(writer.folder)
        if whole.can_generate():
            model.generation_config.save_pretrained(writer.folder)
        _copy_tokenizer(model.name_or_path or "", writer.folder)
    except BaseException as error:
        writer.discard()
        if isinstance(error, (ValueError, TypeError)):  # a configuration that contradicts itself, or is no JSON
            raise CheckpointError(f"{folder} cannot be written: {sentence(error)}") from error
        raise
    return writer


def _whole(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was before it was partitioned, on the meta device."""
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    with torch.device("meta"):
        whole: PreTrainedModel = type(model)(config)
    return whole.to(model.dtype)  # type: ignore[arg-type]  # which the class makes in torch's default


def _plan(
    model: PreTrainedModel, whole: PreTrainedModel, mesh: Mesh
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Source]]:
    """The rank's tensors by the names that are saved; the stored ones, on meta; and which of these has which."""
    own, cut = dict(model.state_dict(keep_vars=True)), cuts(whole, mesh.grid, mesh.model.rank)
    tensors, state = {}, whole.state_dict()
    for names in ties(whole):
        used = next((name for name in names if name in cut), names[0])
        tensors[names[0]] = part = own[used].detach()
        if used in cut and part.shape[cut[used].dim] != cut[used].length:  # experts' padding depends on it
            raise CheckpointError(
                f"{used} was cut for another dtype than {model.dtype}; convert the model before that"
            )
    wholes = {name: torch.empty(state[name].shape, dtype=each.dtype, device="meta") for name, each in tensors.items()}
    views = revert_weight_conversion(whole, wholes)  # experts of one storage, which counts as each one's size
    stored = {key: torch.empty(view.shape, dtype=view.dtype, device="meta") for key, view in views.items()}
    found, _ = sources(whole, stored)
    return tensors, stored, found


def _matrices(
    tensors: dict[str, Tensor],
    stored: dict[str, Tensor],
    found: dict[str, Source],
    everyones: list[dict[str, Cut]],
) -> Iterator[_Matrix]:
    for name, part in tensors.items():
        own = [each[name] for each in everyones if name in each]
        for number, keys in enumerate(found[name].keys):
            places = [(key, stored[key].shape[0]) for key in keys]
            shape = (sum(rows for _, rows in places), *stored[keys[0]].shape[1:])
            if found[name].stacked:
                inside = [Cut(each.dim - 1, each.runs, each.lengths) for each in own]
                yield _Matrix(part[number], shape, inside, places)
            else:
                yield _Matrix(part, shape, own, places)


def _send(matrix: _Matrix, axis: Axis, writer: Writer | None, desk: _Desk) -> None:
    """Bring a tensor's rows to rank 0, some at a time, where they are written."""
    part, rows = matrix.part, matrix.part.shape[0]
    ranks = axis.size if matrix.cuts else 1
    step = max(1, BLOCK * rows // max(1, part.nbytes * ranks))
    for a in range(0, rows, step):
        block = part[a : a + step]
        if not matrix.cuts:
            if writer is not None:
                _write(matrix, a, block, writer)
            continue
        blocks = _gathered(block, axis, desk)
        if writer is None:
            continue
        if matrix.cuts[0].dim == 0:
            for cut, each in zip(matrix.cuts, blocks, strict=True):
                for row, run in _rows(cut, a, each):
                    _write(matrix, row, run, writer)
        else:
            page = desk.page((block.shape[0], *matrix.shape[1:]), block.dtype)
            for cut, each in zip(matrix.cuts, blocks, strict=True):
                cut.put(each, page)
            _write(matrix, a, page, writer)


def _gathered(x: Tensor, axis: Axis, desk: _Desk) -> list[Tensor]:
    """Everyone's x on rank 0, until the next call; nothing elsewhere. As bytes: gloo does not know every dtype."""
    if axis.size == 1:
        return [x]
    sent = x.contiguous().flatten().view(torch.uint8)
    received = list(desk.inbox(axis.size, len(sent))) if axis.rank == 0 else None
    dist.gather(sent, received, group=axis.group, group_dst=0)
    return [each.view(x.dtype).view(x.shape) for each in received or ()]


class _Desk:
    """Room for what arrives and for the page that it is put together on, used again and again: thousands of new
    tensors leave holes in the process's memory, up to its share of the weights once more."""

    def __init__(self, device: str) -> None:
        self._inbox, self._page = (torch.empty(BLOCK, dtype=torch.uint8, device=device) for _ in range(2))

    def inbox(self, ranks: int, nbytes: int) -> Tensor:
        """bytes[ranks, nbytes]"""
        return self._room(self._inbox, ranks * nbytes).view(ranks, nbytes)

    def page(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._room(self._page, torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)

    def _room(self, buffer: Tensor, nbytes: int) -> Tensor:
        # More, if one row of all ranks is.
        return buffer[:nbytes] if nbytes <= len(buffer) else buffer.new_empty(nbytes)


def _rows(cut: Cut, first: int, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Where in the whole each run of x begins, rows of a rank's part from `first` on."""
    at = 0
    for (start, stop), length in zip(cut.runs, cut.lengths, strict=True):
        a, b = max(at, first), min(at + stop - start, first + x.shape[0])
        if a < b:
            yield start + a - at, x[a - first : b - first]
        at += length


def _write(matrix: _Matrix, row: int, x: Tensor, writer: Writer) -> None:
    """Rows of the whole, which may be those of more than one stored tensor."""
    first = 0
    for key, rows in matrix.places:
        a, b = max(row, first), min(row + x.shape[0], first + rows)
        if a < b:
            writer.put(key, a - first, x[a - row : b - row])
        first += rows


def _copy_tokenizer(source: str, target: Path) -> None:
    """What makes the tokenizer in the folder that the model came from, if it came from one."""
    if not source or not Path(source).is_dir():
        return
    for pattern in _TOKENIZER:
        for file in Path(source).glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _finish(writer: Writer | None, folder: Path) -> None:
    assert writer is not None
    writer.close()
    writer.folder.rename(folder)
    disk.sync(folder.parent)
