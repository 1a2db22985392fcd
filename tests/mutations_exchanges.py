"""Exchanges that are wrong: sums left out, chunks in another order, bytes more or fewer than are due."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from mutation import BOTH, NEAR, OUTPUT, Mutation, Patch, layers, replaced
from torch import Tensor

from helix.attention.schedules import batch, rows, score
from helix.certify.cases import Case
from helix.comm import collectives, transport
from helix.parallel import gradients


def _only_on(rank: int, name: str, change: Callable[[Tensor, Any], Tensor]) -> Patch:
    """A transport function whose result one rank alone gets changed."""

    def make(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrong(x: Tensor, axis: Any, *args: Any) -> Tensor:
            out = real(x, axis, *args)
            return change(out, axis) if dist.get_rank() == rank else out

        return wrong

    return replaced(transport, name, make)


def _swapped(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, axis, *rest: real(x, axis, *rest).unflatten(-1, (axis.size, -1)).flip(-2).flatten(-2)


def _unreduced(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Moves the bytes and loses what came."""

    def wrong(x: Tensor, axis: Any, name: str) -> Tensor:
        real(x, axis, name)
        return x

    return wrong


def _mean(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, axis, name: real(x, axis, name) / axis.size


def _twice(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(x: Tensor, axis: Any) -> Tensor:
        real(x.detach(), axis)
        return real(x, axis)

    return wrong


def _uncounted(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(key: str, nbytes: int, x: Tensor, axis: Any, run: Callable[[], Tensor], rows: Any = None) -> Tensor:
        return run() if key == "all_to_all/attention.out" else real(key, nbytes, x, axis, run, rows)

    return wrong


def _own_share_back(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return collectives.gather


def _without(axis: str) -> Callable[[Callable[..., list[str]]], Callable[..., list[str]]]:
    return lambda real: lambda found: [name for name in real(found) if name != axis]


EXCHANGES = (
    Mutation("slices in another order", replaced(batch, "deal", _swapped), layers("batch", *BOTH), OUTPUT),
    Mutation(
        "output not summed over ranks",
        replaced(collectives, "reduce", _unreduced),
        layers("rows", *BOTH),
        "the output is off by|output differs",
        "replicated",
    ),
    Mutation(
        "gradient of the input not summed",
        replaced(collectives, "replicate", lambda real: lambda x, axis, name: x),
        layers("gather", *BOTH),
        "gradient of the input is off by",
        "replicated",
    ),
    Mutation("mean instead of sum", replaced(collectives, "reduce_scatter", _mean), layers("rows", *BOTH), OUTPUT),
    Mutation(
        "partial scores summed in 16 bits",
        lambda: patch.object(score, "torch", SimpleNamespace(**(vars(torch) | {"promote_types": lambda a, b: a}))),
        layers("score", "bf16", "fp16"),
        "bytes of all_reduce/attention.scores",
    ),
    Mutation(
        "gradient of a gather not summed",
        replaced(collectives, "all_gather", _own_share_back),
        layers("gather", *BOTH),
        "gradient of .* is off by",
        "replicated",
    ),
    Mutation(
        "QK-norm's gradient not summed over head groups",
        replaced(gradients, "_in_order", _without("head")),
        layers("rows", *NEAR),
        "gradient of [qk]_norm is off by",
    ),
    Mutation(
        "norms' gradients not summed over slices",
        replaced(gradients, "_in_order", _without("slice")),
        (Case("model", "rows", "fp64"), Case("model", "batch", "fp32")),
        r"gradient of .*norm.* is off by",
    ),
    Mutation(
        "a gather done twice",
        replaced(rows, "_gather_features", _twice),
        layers("rows", *BOTH),
        "all_gather/attention.kv",
    ),
    Mutation(
        "an exchange not counted",
        replaced(transport, "counted", _uncounted),
        layers("batch", *BOTH),
        "sent 0 bytes of all_to_all/attention.out",
    ),
    Mutation(
        "one rank's chunks permuted",
        _only_on(1, "_exchange", lambda out, axis: out.roll(out.shape[0] // axis.size, 0)),
        layers("heads", *BOTH),
        "is off by",
    ),
    Mutation(
        "one rank's sum off by a last bit",
        _only_on(2, "_all_reduce", lambda out, axis: out * (1 + torch.finfo(out.dtype).eps)),
        layers("batch", "fp64", "fp32"),
        "differs from that of other ranks",
        "replicated",
        rank="2",
    ),
)
