"""The four collectives on plain tensors along dim 0, without gradients; counted.

On NCCL each is the library's own call. On gloo each is built from one direct exchange (all-to-all): gloo's
all-reduce, reduce-scatter and all-gather are rings of p - 1 dependent steps, and where more ranks than cores
share a machine every step costs a context switch of every rank. The bytes are the same. Measured on 16 ranks
of 2 cores, 4 MiB: all-reduce 146 ms, exchange + local sum + exchange 55 ms (paper/LOG.md, 2026-11-22).
Small ones go through shared memory instead, where the ranks share a host (`helix.comm.shared_memory`). They are
counted by the same convention, as if a wire were there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from helix.comm.mesh import Axis
from helix.comm.record import counted
from helix.comm.shared_memory import slots_for
from helix.partition import wire

# torch 2.13 renamed these two and deprecated the old names; torch 2.11 has only the old ones.
_all_gather_into: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into: Callable[..., object] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def all_gather(shard: Tensor, axis: Axis, name: str) -> Tensor:
    """shard[X@axis, ..] -> [X, ..]. Every rank's shard has the same size."""
    shard = shard.contiguous()
    nbytes = wire.all_gather(shard.numel(), axis.size, shard.element_size())
    return counted(f"all_gather/{name}", nbytes, shard, axis, lambda: _all_gather(shard, axis))


def reduce_scatter(whole: Tensor, axis: Axis, name: str) -> Tensor:
    """whole[X, ..]{unreduced: axis} -> [X@axis, ..]. The axis' size divides dim 0."""
    whole = whole.contiguous()
    nbytes = wire.reduce_scatter(whole.numel(), axis.size, whole.element_size())
    return counted(f"reduce_scatter/{name}", nbytes, whole, axis, lambda: _reduce_scatter(whole, axis))


def all_reduce(partial: Tensor, axis: Axis, name: str) -> Tensor:
    """partial{unreduced: axis} -> the sum, a new tensor, equal on every rank to the last bit."""
    nbytes = wire.all_reduce(partial.numel(), axis.size, partial.element_size())
    return counted(f"all_reduce/{name}", nbytes, partial, axis, lambda: _all_reduce(partial, axis))


def all_to_all(x: Tensor, axis: Axis, send: list[int], receive: list[int], name: str) -> Tensor:
    """x[sum(send), ..] -> [sum(receive), ..]: `send[r]` rows of dim 0 go to rank r, `receive[r]` come from it."""
    x = x.contiguous()
    row = x[0].numel() if x.shape[0] else 0
    nbytes = wire.all_to_all(sum(send) * row, send[axis.rank] * row, x.element_size())
    rows = send, receive
    return counted(f"all_to_all/{name}", nbytes, x, axis, lambda: _exchange(x, axis, *rows), rows)


def all_to_all_even(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x[P, ..] -> [P, ..]: the r-th of the axis' P ranks gets x[r], and x[r] comes from it.

    Unlike `all_to_all`, whose sizes one rank does not know of another, it may go through shared memory.
    """
    x = x.contiguous()
    nbytes = wire.all_to_all(x.numel(), x.numel() // axis.size, x.element_size())
    return counted(f"all_to_all/{name}", nbytes, x, axis, lambda: _even_exchange(x, axis))


def _even_exchange(x: Tensor, axis: Axis) -> Tensor:
    if slots := slots_for(x, axis):
        return slots.exchange(x)[:, axis.rank].clone()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=axis.group)
    return out


def _exchange(x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x, receive, send, group=axis.group)
    return out


def _all_gather(shard: Tensor, axis: Axis) -> Tensor:
    if slots := slots_for(shard, axis):
        return slots.exchange(shard).clone().flatten(0, 1)
    out = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:]))
    if axis.exchanges:
        copies = shard.expand(axis.size, *shard.shape).contiguous().view(out.shape)
        dist.all_to_all_single(out, copies, group=axis.group)
    else:
        _all_gather_into(out, shard, group=axis.group)
    return out


def _reduce_scatter(whole: Tensor, axis: Axis) -> Tensor:
    if axis.exchanges:
        return _even_exchange(whole.unflatten(0, (axis.size, -1)), axis).sum(0, dtype=whole.dtype)
    out = whole.new_empty((whole.shape[0] // axis.size, *whole.shape[1:]))
    _reduce_scatter_into(out, whole, group=axis.group)
    return out


def _all_reduce(partial: Tensor, axis: Axis) -> Tensor:
    if not axis.exchanges:
        out = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=axis.group)
        return out
    if slots := slots_for(partial, axis):
        return slots.exchange(partial).sum(0, dtype=partial.dtype)
    flat = partial.reshape(-1)
    padding = -flat.numel() % axis.size
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    whole = _all_gather(_reduce_scatter(flat.contiguous(), axis), axis)
    return whole[: partial.numel()].view(partial.shape)
