"""Bytes that leave one rank in one collective, by the bandwidth-optimal algorithm.

The one place where this convention lives: the counters of `helix.comm` and the closed forms of
`helix.partition.cost` both call it, the first with the tensors that were really moved, the second with the
model's dims. p is the number of ranks of the mesh axis; an axis of one rank moves nothing.
"""

from __future__ import annotations


def all_gather(shard_numel: int, p: int, itemsize: int) -> int:
    """Each rank's shard goes to the p - 1 others."""
    return (p - 1) * shard_numel * itemsize


def reduce_scatter(numel: int, p: int, itemsize: int) -> int:
    """Of `numel` values to be summed, each rank sends the p - 1 shares that are not its own."""
    return (p - 1) * (-(-numel // p)) * itemsize


def all_reduce(numel: int, p: int, itemsize: int) -> int:
    """A reduce-scatter followed by an all-gather; shares are rounded up where p does not divide numel."""
    return 2 * reduce_scatter(numel, p, itemsize)


def all_to_all(sent_numel: int, own_numel: int, itemsize: int) -> int:
    """Everything that a rank deals out, less the share it keeps."""
    return (sent_numel - own_numel) * itemsize


def broadcast(numel: int, p: int, itemsize: int, root: bool) -> int:
    """The root deals out p shares, and an all-gather follows; the others send only in that."""
    share = -(-numel // p)
    return (2 if root else 1) * all_gather(share, p, itemsize)
