"""Implementations that are wrong, each by one patch on every rank: what `helix.verify` has to find."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from helix.attention import layer
from helix.attention.schedules import batch, gather, heads, perslice, rows, score
from helix.certify.cases import Case
from helix.comm import collectives, transport
from helix.parallel import gradients
from helix.pretrained import sharing, store

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Args:
        name: what is wrong.
        patch: puts it in place; entered on every rank.
        cases: that are verified with it, of which each has to fail.
        said: a pattern of the first failure of each.
        rank: the rank that it has to name, where the fault is one rank's and stays there.
        residual: layout of the stream.
    """

    name: str
    patch: Patch
    cases: tuple[Case, ...]
    said: str
    residual: str = "sharded"
    rank: str = r"\d+"


def _layers(schedule: str, *precisions: str) -> tuple[Case, ...]:
    return tuple(Case("layer", schedule, precision) for precision in precisions)


def _decodes(first: str, then: str, *precisions: str) -> tuple[Case, ...]:
    return tuple(Case("decode", first, precision, then) for precision in precisions)


ALL = ("fp64", "fp32", "bf16", "fp16")
NARROW = ("fp64", "fp32")


def _replace(where: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    """A function in place of another, made from it."""
    return lambda: patch.object(where, name, make(getattr(where, name)))


def _only_on(rank: int, name: str, change: Callable[[Tensor, Any], Tensor]) -> Patch:
    """A transport function whose result one rank alone gets changed."""

    def make(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrong(x: Tensor, axis: Any, *args: Any) -> Tensor:
            out = real(x, axis, *args)
            return change(out, axis) if dist.get_rank() == rank else out

        return wrong

    return _replace(transport, name, make)


def _wrong_scale() -> AbstractContextManager[Any]:
    """1 / sqrt(d_s) for 1 / sqrt(d)."""
    return patch.object(score, "math", SimpleNamespace(sqrt=lambda d: math.sqrt(d / 2), inf=math.inf))


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


def _no_later_key(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A causal mask that ends one key early, in the rows that begin after the first."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if causal and 0 < q.shape[1] < k.shape[1]:
            return real(q, k[:, :-1], v[:, :-1], causal)
        return real(q, k, v, causal)

    return wrong


def _other_group(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Query head h reads KV head h mod K, not h // (H / K)."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        times = q.shape[2] // k.shape[2]
        return real(q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1), causal)

    return wrong


def _stale(real: Callable[..., None]) -> Callable[..., None]:
    """What comes after the prompt is not what is kept: the last token's keys and values are, once more."""

    def wrong(self: Any, keys: Tensor, values: Tensor) -> None:
        if keys.shape[2] == 1 and self.keys.shape[2] > 0:
            keys, values = self.keys[:, :, -1:].clone(), self.values[:, :, -1:].clone()
        real(self, keys, values)

    return wrong


def _even_weights(real: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A merge in which every rank's part counts as much, whatever its log-sum-exp."""

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        out, sums = real(*args)
        return out, torch.where(sums > -1e30, sums * 0, sums)

    return wrong


def _twice(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(x: Tensor, axis: Any) -> Tensor:
        real(x.detach(), axis)
        return real(x, axis)

    return wrong


def _uncounted(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(key: str, nbytes: int, device: Any, group: Any, run: Callable[[], Tensor]) -> Tensor:
        return run() if key == "all_to_all/attention.out" else real(key, nbytes, device, group, run)

    return wrong


def _last_dropped(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = real(q, k, v, causal)
        return torch.cat([out[:, :-1], out[:, -1:] * 0], 1)

    return wrong


def _in_bf16(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return real(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal).to(q.dtype)

    return wrong


def _all_seen(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, causal: real(q, k, v, False)


def _wide_scale(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """sqrt(d) where the narrow heads have sqrt(d_s)."""
    return lambda q, k, v, causal: real(q / math.sqrt(2), k, v, causal)


def _own_share_back(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return collectives.gather


def _without(axis: str) -> Callable[[Callable[..., list[str]]], Callable[..., list[str]]]:
    return lambda real: lambda found: [name for name in real(found) if name != axis]


def _neighbours(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rank keeps the next one's KV heads."""

    def wrong(self: Any, new: Tensor, first: int) -> Tensor:
        return real(self, new.roll(1, 1), first)

    return wrong


OUTPUT = "the output is off by"
MUTATIONS: Sequence[Mutation] = (
    Mutation("scale of a slice", _wrong_scale, _layers("score", *ALL), OUTPUT),
    Mutation("slices in another order", _replace(batch, "deal", _swapped), _layers("batch", *ALL), OUTPUT),
    Mutation(
        "output not summed over ranks",
        _replace(collectives, "reduce", _unreduced),
        _layers("rows", *ALL),
        "the output is off by|output differs",
        "replicated",
    ),
    Mutation(
        "gradient of the input not summed",
        _replace(collectives, "replicate", lambda real: lambda x, axis, name: x),
        _layers("gather", *ALL),
        "gradient of the input is off by",
        "replicated",
    ),
    Mutation("mean instead of sum", _replace(collectives, "reduce_scatter", _mean), _layers("rows", *ALL), OUTPUT),
    Mutation(
        "QK-norm of a slice alone",
        _replace(layer.HelixAttention, "_rms_norm", lambda real: lambda self, z, exact: real(self, z, False)),
        _layers("batch", *ALL),
        "the .* is off by",
    ),
    Mutation(
        "mask one key short", _replace(rows, "fused_attention", _no_later_key), _layers("rows", *ALL), "is off by"
    ),
    Mutation("mask left out", _replace(heads, "fused_attention", _all_seen), _layers("heads", *ALL), "is off by"),
    Mutation(
        "RoPE of contiguous slices",
        _replace(layer, "rotate_slice", lambda real: lambda z, j, m: real(z, 0, 1)),
        _layers("gather", *ALL),
        "is off by",
    ),
    Mutation(
        "KV head of another group", _replace(batch, "fused_attention", _other_group), _layers("batch", *ALL), OUTPUT
    ),
    Mutation(
        "last position dropped", _replace(heads, "fused_attention", _last_dropped), _layers("heads", *ALL), "off by"
    ),
    Mutation(
        "bf16 inside fp32", _replace(gather, "fused_attention", _in_bf16), _layers("gather", *NARROW), "is off by"
    ),
    Mutation(
        "partial scores summed in 16 bits",
        lambda: patch.object(score, "torch", SimpleNamespace(**(vars(torch) | {"promote_types": lambda a, b: a}))),
        _layers("score", "bf16", "fp16"),
        "bytes of all_reduce/attention.scores",
    ),
    Mutation(
        "narrow heads with the wide ones' scale",
        _replace(perslice, "fused_attention", _wide_scale),
        _layers("perslice", *ALL),
        "is off by",
    ),
    Mutation(
        "gradient of a gather not summed",
        _replace(collectives, "all_gather", _own_share_back),
        _layers("gather", *ALL),
        "gradient of .* is off by",
        "replicated",
    ),
    Mutation(
        "QK-norm's gradient not summed over head groups",
        _replace(gradients, "_in_order", _without("head")),
        _layers("rows", *ALL),
        "gradient of [qk]_norm is off by",
    ),
    Mutation(
        "norms' gradients not summed over slices",
        _replace(gradients, "_in_order", _without("slice")),
        (Case("model", "rows", "fp64"), Case("model", "batch", "fp32")),
        r"gradient of .*norm.* is off by",
    ),
    Mutation(
        "a gather done twice",
        _replace(rows, "_gather_features", _twice),
        _layers("rows", *ALL),
        "all_gather/attention.kv",
    ),
    Mutation(
        "an exchange not counted",
        _replace(transport, "counted", _uncounted),
        _layers("batch", *ALL),
        "sent 0 bytes of all_to_all/attention.out",
    ),
    Mutation(
        "one rank's chunks permuted",
        _only_on(1, "_exchange", lambda out, axis: out.roll(out.shape[0] // axis.size, 0)),
        _layers("heads", *ALL),
        "is off by",
    ),
    Mutation(
        "one rank's sum off by a last bit",
        _only_on(2, "_all_reduce", lambda out, axis: out * (1 + torch.finfo(out.dtype).eps)),
        _layers("batch", *NARROW),
        "differs from that of other ranks",
        "replicated",
        rank="2",
    ),
    Mutation(
        "a stale cache", _replace(store.Store, "append", _stale), _decodes("rows", "kvseq", *ALL), "output of step"
    ),
    Mutation(
        "a stale cache of samples",
        _replace(store.Store, "append", _stale),
        _decodes("rows", "batch", *ALL),
        "output of step",
    ),
    Mutation(
        "a merge without weights",
        _replace(sharing, "partial", _even_weights),
        _decodes("heads", "kvseq", *ALL),
        "output of step",
    ),
    Mutation(
        "another rank's KV heads",
        _replace(sharing.KeyHeads, "keep", _neighbours),
        _decodes("rows", "heads", *ALL),
        "output of step",
    ),
)
