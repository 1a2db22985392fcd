"""Attention on one device from whole weights, written to be read; what every schedule is held against.

It shares no code with the partitioned layer: the scores are formed explicitly, in the dtype of the input.
Weights are laid out as `HelixAttention` stores them, P = 2 halves with RoPE, else 1:

    wq[H, P, D/P, E]   wk[K, P, D/P, E]   wv[K, P, D/P, E]   wo[E, H, P, D/P]   q_norm[P, D/P]   k_norm[P, D/P]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QK_NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


def attention_oracle(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor | None = None,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    causal: bool = True,
    rope: bool = False,
    slices: int = 1,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V W_O for x[B, T, E], or the papers' formula with `slices` = m.

    Args:
        wo: None for the concatenated heads [B, T, H * D] (`aggregate=concat`).
        q_norm, k_norm: QK-norm weights, or None for no QK-norm.
        slices: cuts every head into this many narrow heads of D / slices features, each with its own softmax
            and scale 1 / sqrt(D / slices): softmax(Q_j K_j^T / sqrt(d_s)) V_j, then concatenated (papers,
            "Computation on Each Partition"). RoPE turns each pair by its angle in the whole head. 1 is
            ordinary multi-head, grouped-query or multi-query attention.
    """
    batch, length, _ = x.shape
    heads, parts, run, _ = wq.shape
    q, k, v = (torch.einsum("bte,hpde->bthpd", x, w) for w in (wq, wk, wv))
    if q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm, slices), _rms_norm(k, k_norm, slices)
    if rope:
        q, k = _rotate(q), _rotate(k)
    # [B, T, heads, P, slices, run/slices] -> [B, heads, slices, T, d_s]: narrow head (h, j) is slice j of head h
    q, k, v = (
        z.view(batch, length, -1, parts, slices, run // slices).permute(0, 2, 4, 1, 3, 5).flatten(-2)
        for z in (q, k, v)
    )
    k, v = (z.repeat_interleave(heads // wk.shape[0], dim=1) for z in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    o = scores.softmax(-1) @ v
    # [B, H, slices, T, (P, run/slices)] -> [B, T, H, P, D/P]
    o = o.view(batch, heads, slices, length, parts, run // slices).permute(0, 3, 1, 4, 2, 5)
    o = o.reshape(batch, length, heads, parts, run)
    return o.flatten(2) if wo is None else torch.einsum("bthpd,ehpd->bte", o, wo)


def block_weights(blocks: Tensor, heads: int, m: int, n: int) -> Tensor:
    """The dense weight that the papers' literal W^(i,j) stand for (`projection=block`).

    Args:
        blocks: [H or K, P, D/P, C], C = E / (m n): each output feature with the C input features of its block.
        heads: H, the query heads.

    Returns:
        [H or K, P, D/P, E], zero outside the diagonal blocks. Block (i, j) reads the input features that rank
        (i, j) would own of a tensor laid out [H, P, D/P].
    """
    outputs, parts, run, block = blocks.shape
    width = block * m * n
    columns = torch.arange(width).view(n, heads // n, parts, m, run // m)
    dense = blocks.new_zeros(n, outputs // n, parts, m, run // m, width)
    cells = blocks.view(n, outputs // n, parts, m, run // m, block)
    for i in range(n):
        for j in range(m):
            dense[i, :, :, j][..., columns[i, :, :, j].flatten()] = cells[i, :, :, j]
    return dense.view(outputs, parts, run, width)


def _rotate(z: Tensor) -> Tensor:
    """Rotary embedding of z[B, T, H, 2, D/2] by position (RoFormer, eq. 34, in the rotate-half form)."""
    length, half = z.shape[1], z.shape[-1]
    frequency = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64, device=z.device) / half)
    angle = torch.arange(length, dtype=torch.float64, device=z.device)[:, None] * frequency
    cos, sin = (f(angle).to(z.dtype)[:, None] for f in (torch.cos, torch.sin))
    first, second = z.unbind(-2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)


def _rms_norm(z: Tensor, weight: Tensor, slices: int) -> Tensor:
    """RMS norm of z[B, T, H, P, D/P] over the features of each (narrow) head, then its weight[P, D/P]."""
    narrow = z.unflatten(-1, (slices, -1))
    scale = (narrow.pow(2).mean((-3, -1), keepdim=True) + QK_NORM_EPS).rsqrt()
    return (narrow * scale).flatten(-2) * weight
