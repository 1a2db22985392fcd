"""The one call into PyTorch's fused attention, and the rotary embedding of a slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from helix.attention.oracle import ROPE_BASE
from helix.comm.record import phase


def unpack(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv[B, T, H + 2K, D] -> q[B, T, H, D], k, v[B, T, K, D], for H = `heads`; views."""
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    return q, k, v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for whole or narrow heads.

    Args:
        q: [B, T, H, D]; k: [B, S, K, D]; v: [B, S, K, D or D/m], with K dividing H.
        causal: whether query t sees only keys up to S - T + t, so that q may be the last T rows of S.

    Returns:
        [B, T, H, D or D/m].
    """
    with phase("attention.core"):
        return _fused_attention(q, k, v, causal)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if q.numel() == 0:
        # A rank that was dealt no sample or row; the sum ties it to the graph, so that its backward still
        # takes part in the collectives.
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + (q.sum() + k.sum() + v.sum()) * 0
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        # Not `enable_gqa=True`: the CPU's flash kernel does not take it, and the fallback forms all scores.
        k, v = (z.unsqueeze(3).expand(-1, -1, -1, repeat, -1).flatten(2, 3) for z in (k, v))
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    if not causal:
        o = F.scaled_dot_product_attention(q, k, v)
    elif q.shape[2] == k.shape[2]:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=_lower_right(q.shape[2], k.shape[2]))
    return o.transpose(1, 2)


def _lower_right(rows: int, keys: int) -> CausalBias:
    """The mask by which the last `rows` of so many tokens see all before them; no numbers, but for the kernel a name.

    torch's constructor of it fails under a mode that watches operators.
    """
    with _disable_current_modes():
        return causal_lower_right(rows, keys)


def rotate_slice(z: Tensor, feature_slice: int, slices: int) -> Tensor:
    """Rotary embedding of z[B, T, H, D@slice], slice j holding chunk j of both halves of each head.

    Args:
        feature_slice: j; its pairs turn by the angles that they have in the whole head.
        slices: m.
    """
    half = z.shape[-1] // 2
    pair = torch.arange(feature_slice * half, (feature_slice + 1) * half, dtype=torch.float64, device=z.device)
    frequency = ROPE_BASE ** (-pair / (half * slices))
    angle = torch.arange(z.shape[1], dtype=torch.float64, device=z.device)[:, None] * frequency
    cos, sin = (f(angle).to(z.dtype)[:, None] for f in (torch.cos, torch.sin))
    first, second = z[..., :half], z[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
