"""Attention that is wrong on a rank: its scale, order, mask, norm, positions, heads and precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from mutation import BOTH, NEAR, OUTPUT, Mutation, layers, replaced
from torch import Tensor

from helix.attention import layer
from helix.attention.schedules import batch, gather, heads, perslice, rows, score


def _wrong_scale() -> AbstractContextManager[Any]:
    """1 / sqrt(d_s) for 1 / sqrt(d)."""
    return patch.object(score, "math", SimpleNamespace(sqrt=lambda d: math.sqrt(d / 2), inf=math.inf))


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


ATTENTION = (
    Mutation("scale of a slice", _wrong_scale, layers("score", *NEAR), OUTPUT),
    Mutation(
        "QK-norm of a slice alone",
        replaced(layer.HelixAttention, "_rms_norm", lambda real: lambda self, z, exact: real(self, z, False)),
        layers("batch", *BOTH),
        "the .* is off by",
    ),
    Mutation(
        "mask one key short", replaced(rows, "fused_attention", _no_later_key), layers("rows", *BOTH), "is off by"
    ),
    Mutation("mask left out", replaced(heads, "fused_attention", _all_seen), layers("heads", *BOTH), "is off by"),
    Mutation(
        "RoPE of contiguous slices",
        replaced(layer, "rotate_slice", lambda real: lambda z, j, m: real(z, 0, 1)),
        layers("gather", *BOTH),
        "is off by",
    ),
    Mutation(
        "KV head of another group", replaced(batch, "fused_attention", _other_group), layers("batch", *BOTH), OUTPUT
    ),
    Mutation(
        "last position dropped", replaced(heads, "fused_attention", _last_dropped), layers("heads", *BOTH), "off by"
    ),
    Mutation(
        "bf16 inside fp32",
        replaced(gather, "fused_attention", _in_bf16),
        layers("gather", "fp64", "fp32"),
        "is off by",
    ),
    Mutation(
        "narrow heads with the wide ones' scale",
        replaced(perslice, "fused_attention", _wide_scale),
        layers("perslice", *NEAR),
        "is off by",
    ),
)
