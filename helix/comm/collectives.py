"""Differentiable collectives over one mesh axis, each a forward/backward pair.

Two conventions meet at a collective, and the backward depends on which holds downstream:

* *sharded work*: each rank does something different with the result, so its gradient is partial and has to
  be summed over the axis (all_gather <-> reduce_scatter, all_reduce <-> all_reduce);
* *replicated work*: all ranks do the same with the result, so each already holds the whole gradient
  (gather <-> split, reduce <-> identity).

    function         forward                  backward                 used for
    all_to_all       all-to-all               all-to-all               re-layout inside the m-group
    all_gather       all-gather               reduce-scatter           K, V of `rows`; residual -> block
    reduce_scatter   reduce-scatter           all-gather               block -> residual
    all_reduce       all-reduce               all-reduce               partial scores, QK-norm
    replicate        identity                 all-reduce               replicated x into sharded work
    reduce           all-reduce               identity                 row-parallel output to replicated work
    gather           all-gather               split (own share)        the papers' concatenation
    split            own share                all-gather               replicated x -> sharded residual

All act on dim 0; whoever calls lays the tensor out so that dim 0 is the one that moves. An axis of one rank
returns its input and moves nothing. No function changes its argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helix.comm import transport
from helix.comm.mesh import Axis


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: list[int], receive: list[int], name: str) -> Tensor:
        ctx.axis, ctx.send, ctx.receive, ctx.name = axis, send, receive, name
        return transport.all_to_all(x, axis, send, receive, name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = transport.all_to_all(grads[0], ctx.axis, ctx.receive, ctx.send, f"{ctx.name}.grad")
        return grad, None, None, None, None


class _Pair(torch.autograd.Function):
    """One of the functions below with its backward; both are `transport` functions or local ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, name: str, forward: Any, backward: Any) -> Tensor:
        ctx.axis, ctx.name, ctx.backward_fn = axis, name, backward
        return forward(x, axis, name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.backward_fn(grads[0], ctx.axis, f"{ctx.name}.grad"), None, None, None, None


def _identity(x: Tensor, axis: Axis, name: str) -> Tensor:
    return x.view_as(x)


def _own_share(x: Tensor, axis: Axis, name: str) -> Tensor:
    share = x.shape[0] // axis.size
    return x.narrow(0, axis.rank * share, share).clone()


def _apply(x: Tensor, axis: Axis, name: str, forward: Any, backward: Any) -> Tensor:
    if axis.size == 1:
        return x
    if not (x.requires_grad and torch.is_grad_enabled()):
        return forward(x, axis, name)  # autograd's own bookkeeping costs more than a small exchange's copy
    return _Pair.apply(x, axis, name, forward, backward)


def all_to_all(x: Tensor, axis: Axis, send: list[int], receive: list[int], name: str) -> Tensor:
    """x[sum(send), ..] -> [sum(receive), ..]; the backward sends every row back where it came from."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis, send, receive, name)


def all_to_all_even(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x[P, ..] -> [P, ..], x[r] going to rank r; the backward sends every row back where it came from."""
    return _apply(x, axis, name, transport.all_to_all_even, transport.all_to_all_even)


def all_gather(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x[X@axis, ..] -> [X, ..], for sharded work. Backward: reduce-scatter."""
    return _apply(x, axis, name, transport.all_gather, transport.reduce_scatter)


def reduce_scatter(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x[X, ..]{unreduced: axis} -> [X@axis, ..]. Backward: all-gather."""
    return _apply(x, axis, name, transport.reduce_scatter, transport.all_gather)


def all_reduce(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x{unreduced: axis} -> sum, for sharded work. Backward: all-reduce."""
    return _apply(x, axis, name, transport.all_reduce, transport.all_reduce)


def replicate(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x, replicated, on its way into sharded work. Backward: all-reduce."""
    return _apply(x, axis, name, _identity, transport.all_reduce)


def reduce(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x{unreduced: axis} -> sum, for replicated work. Backward: identity."""
    return _apply(x, axis, name, transport.all_reduce, _identity)


def gather(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x[X@axis, ..] -> [X, ..], for replicated work. Backward: own share."""
    return _apply(x, axis, name, transport.all_gather, _own_share)


def split(x: Tensor, axis: Axis, name: str) -> Tensor:
    """x[X, ..], replicated -> [X@axis, ..]. Backward: all-gather."""
    return _apply(x, axis, name, _own_share, transport.all_gather)
