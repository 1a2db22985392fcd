"""Which entries of each of a model's tensors a rank holds, as integers: before any weight is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from helix.partition.architectures import Experts, Projections
from helix.partition.families import PretrainedShape, describe, expert_share
from helix.partition.grid import Grid, shard_range
from helix.pretrained.structure import (
    experts_of,
    family_of,
    feedforward_of,
    is_transposed,
    layers_of,
    same_tensors,
    sizes,
    tensor,
)


@dataclass(frozen=True)
class Cut:
    """Runs of one dim of a whole tensor, in the order in which a rank holds them, each with zeros after it.

    Args:
        dim: of the whole tensor.
        runs: (start, stop) of each.
        lengths: of each in the rank's dim, zeros included.
    """

    dim: int
    runs: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Of the rank's dim."""
        return sum(self.lengths)

    @property
    def places(self) -> tuple[int, ...]:
        """Where each run begins in the rank's dim."""
        return tuple(sum(self.lengths[:index]) for index in range(len(self.lengths)))

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, a copy."""
        shape = [*whole.shape]
        shape[self.dim] = self.length
        part = whole.new_zeros(shape)
        for (start, stop), place in zip(self.runs, self.places, strict=True):
            part.narrow(self.dim, place, stop - start).copy_(whole.narrow(self.dim, start, stop - start))
        return part

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write a rank's part to where it belongs in the whole."""
        for (start, stop), place in zip(self.runs, self.places, strict=True):
            whole.narrow(self.dim, start, stop - start).copy_(part.narrow(self.dim, place, stop - start))


def cuts(model: PreTrainedModel, grid: Grid, rank: int) -> dict[str, Cut]:
    """What rank i * m + j holds of each parameter that is cut, by all of its names; it holds the others whole.

    Args:
        model: on any device, `meta` too.

    Raises:
        PartitionError: if Helix does not partition the family, or the grid does not divide its heads.
    """
    shape, family = describe(model.config.to_dict()), family_of(model)
    shape.check(grid)
    out: dict[str, Cut] = {}
    for path in family.embeddings:
        out[f"{path}.weight"] = share(0, tensor(model.get_submodule(path), "weight").shape[0], grid, rank)
    for path in family.heads:
        linear = model.get_submodule(path)
        out |= _linear_cut(linear, path, share(0, sizes(linear)[0], grid, rank), bias=True)
    for number, layer in enumerate(layers_of(model, family)):
        own = _attention_cuts(layer, family.attention, shape, grid, rank)
        if (mlp := feedforward_of(layer, family)) is not None:
            for path in mlp.columns:
                linear = layer.get_submodule(path)
                own |= _linear_cut(linear, path, share(0, sizes(linear)[0], grid, rank), bias=True)
            linear = layer.get_submodule(mlp.row)
            own |= _linear_cut(linear, mlp.row, share(1, sizes(linear)[1], grid, rank), bias=False)
        if (experts := experts_of(layer, family)) is not None:
            own |= _expert_cuts(layer, experts, grid, rank)
        out |= {f"{family.layers}.{number}.{name}": cut for name, cut in own.items()}
    for name, first in same_tensors(model):
        if name in out or first in out:
            out[name] = out[first] = out.get(name) or out[first]
    return out


def share(dim: int, size: int, grid: Grid, rank: int) -> Cut:
    """An even share of a dim, padded with zeros where the ranks do not divide it."""
    own = shard_range(size, grid.ranks, rank)
    return Cut(dim, ((own.start, own.stop),), (-(-size // grid.ranks),))


def _attention_cuts(
    layer: nn.Module, names: Projections, shape: PretrainedShape, grid: Grid, rank: int
) -> dict[str, Cut]:
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    if names.heads == "separate":
        runs = [_head_rows(0, count, dim, grid, rank) for count in (heads, kv_heads, kv_heads)]
    elif names.heads == "stacked":
        firsts = (0, heads, heads + kv_heads)
        stacked = zip(firsts, (heads, kv_heads, kv_heads), strict=True)
        runs = [[run for first, count in stacked for run in _head_rows(first * dim, count, dim, grid, rank)]]
    else:  # a head's queries, keys and values lie together
        runs = [_head_rows(0, heads, dim, grid, rank, parts=3)]
    out: dict[str, Cut] = {}
    for path, own in zip(names.columns, runs, strict=True):
        out |= _linear_cut(layer.get_submodule(path), path, _unpadded(0, own), bias=True)
    row = _unpadded(1, _head_rows(0, heads, dim, grid, rank))
    return out | _linear_cut(layer.get_submodule(names.row), names.row, row, bias=False)


def _head_rows(first: int, heads: int, dim: int, grid: Grid, rank: int, parts: int = 1) -> Iterable[tuple[int, int]]:
    """The rows of `heads` heads, from row `first` on, that rank i * m + j holds: of group i's, slice j.

    Args:
        dim: rows of each of a head's `parts`.
    """
    group, feature_slice = grid.coordinates(rank)
    width = dim // grid.m
    for head in grid.owned_heads(heads, group):
        for part in range(parts):
            start = first + (head * parts + part) * dim + feature_slice * width
            yield start, start + width


def _unpadded(dim: int, runs: Iterable[tuple[int, int]]) -> Cut:
    together = tuple(_joined(runs))
    return Cut(dim, together, tuple(stop - start for start, stop in together))


def _joined(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs with neighbours as one, so that few reads take them."""
    begin = end = -1
    for start, stop in runs:
        if start == end:
            end = stop
            continue
        if begin >= 0:
            yield begin, end
        begin, end = start, stop
    if begin >= 0:
        yield begin, end


def _linear_cut(linear: nn.Module, path: str, cut: Cut, bias: bool) -> dict[str, Cut]:
    """A linear layer's cut, given as of a weight [out, in]."""
    dim = 1 - cut.dim if is_transposed(linear) else cut.dim
    out = {f"{path}.weight": Cut(dim, cut.runs, cut.lengths)}
    if bias and linear.bias is not None:
        out[f"{path}.bias"] = Cut(0, cut.runs, cut.lengths)
    return out


def _expert_cuts(layer: nn.Module, names: Experts, grid: Grid, rank: int) -> dict[str, Cut]:
    """The same share of each expert's gates and ups, and of its downs; each padded by itself."""
    whole = tensor(layer.get_submodule(names.module), names.down)
    hidden = whole.shape[2]
    even = share(2, hidden, grid, rank)
    ((start, stop),) = even.runs
    lengths = (expert_share(hidden, grid.ranks, whole.element_size()),)
    down = Cut(2, even.runs, lengths)
    gate_up = Cut(1, ((start, stop), (hidden + start, hidden + stop)), 2 * lengths)
    return {f"{names.module}.{names.gate_up}": gate_up, f"{names.module}.{names.down}": down}
