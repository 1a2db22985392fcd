"""Which entries of each of a model's tensors a rank holds, as integers: before any weight is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.partition.grid import Grid


@dataclass(frozen=True)
class Cut:
    """Runs of one dim of a whole tensor, in the order in which a rank holds them; zeros up to `length` follow.

    Args:
        dim: of the whole tensor.
        runs: (start, stop) of each.
        length: of the rank's dim.
    """

    dim: int
    runs: tuple[tuple[int, int], ...]
    length: int

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, a copy."""
        return self.join([whole.narrow(self.dim, start, stop - start) for start, stop in self.runs])

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The runs' tensors as this rank's part."""
        part = torch.cat(pieces, self.dim)
        missing = self.length - part.shape[self.dim]
        if missing:
            shape = [*part.shape]
            shape[self.dim] = missing
            part = torch.cat([part, part.new_zeros(shape)], self.dim)
        return part.contiguous()

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write a rank's part to where it belongs in the whole."""
        done = 0
        for start, stop in self.runs:
            whole.narrow(self.dim, start, stop - start).copy_(part.narrow(self.dim, done, stop - start))
            done += stop - start


def merged(runs: Iterator[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Runs with neighbours joined, so that few reads take them."""
    out: list[tuple[int, int]] = []
    for start, stop in runs:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def head_rows(first: int, heads: int, dim: int, grid: Grid, rank: int) -> Iterator[tuple[int, int]]:
    """The rows of `heads` heads of width `dim`, from row `first` on, that rank i * m + j holds: group i, slice j."""
    group, feature_slice = divmod(rank, grid.m)
    own, width = heads // grid.n, dim // grid.m
    for head in range(group * own, (group + 1) * own):
        start = first + head * dim + feature_slice * width
        yield start, start + width


def share(dim: int, size: int, grid: Grid, rank: int) -> Cut:
    """An even share of a dim, padded with zeros where the ranks do not divide it."""
    each = -(-size // grid.ranks)
    start = min(rank * each, size)
    return Cut(dim, ((start, min(start + each, size)),), each)
