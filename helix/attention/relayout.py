"""Dealing whole things of one dim to the m-group, in exchange for their features: the two all-to-alls.

Before, each rank has a slice of every thing's features; after, each has all features of its own things. The
things are samples (`batch`), heads (`heads`) or query rows (`rows`). For m = 2 and four things a b c d:

    rank 0: a0 b0 c0 d0         rank 0: a0a1 b0b1
    rank 1: a1 b1 c1 d1   <->   rank 1: c0c1 d0d1

Whole features come out as [slice 0, slice 1, ..], which with RoPE is a permutation of the head's own order.
Q and K are permuted alike, so the scores are equal, and V's order comes back with the output.
"""

from __future__ import annotations

from torch import Tensor

from helix.comm import collectives
from helix.comm.mesh import Axis


def deal(x: Tensor, axis: Axis, sizes: list[int], name: str) -> Tensor:
    """x[X, .., D@slice] -> [X@slice, .., D]; `sizes[r]` of dim 0 go to rank r."""
    if axis.size == 1:
        return x
    mine = sizes[axis.rank]
    blocks = collectives.all_to_all(x, axis, sizes, [mine] * axis.size, name)
    # [m * mine, .., D/m], source rank major -> [mine, .., m, D/m]
    return blocks.view(axis.size, mine, *x.shape[1:]).movedim(0, -2).flatten(-2)


def collect(x: Tensor, axis: Axis, sizes: list[int], name: str) -> Tensor:
    """x[X@slice, .., D] -> [X, .., D@slice]; the inverse of `deal`."""
    if axis.size == 1:
        return x
    mine = sizes[axis.rank]
    blocks = x.unflatten(-1, (axis.size, -1)).movedim(-2, 0).flatten(0, 1)
    return collectives.all_to_all(blocks, axis, [mine] * axis.size, sizes, name)
