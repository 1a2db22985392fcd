"""The oracle, and what it says of narrow heads, against PyTorch's own attention.

Outputs only: its gradients are autograd's, of plain operations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix import Grid
from helix.attention.oracle import ROPE_BASE, attention_oracle
from helix.partition.grid import HeadLayout


def weights_of(heads: int, kv_heads: int, head_dim: int, width: int, parts: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(count, parts, head_dim // parts, width) for count in (heads, kv_heads, kv_heads)]
    shapes.append((width, heads, parts, head_dim // parts))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in shapes]


def torch_attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, causal: bool) -> Tensor:
    """`nn.MultiheadAttention` with these weights."""
    heads, width = wq.shape[0], x.shape[-1]
    layer = nn.MultiheadAttention(width, heads, bias=False, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat([w.reshape(width, width) for w in (wq, wk, wv)]))
        layer.out_proj.weight.copy_(wo.reshape(width, width))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
        return layer(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False])
def test_oracle_is_multihead_attention(x: Tensor, causal: bool) -> None:
    weights = weights_of(4, 4, 8, 32)
    torch.testing.assert_close(attention_oracle(x, *weights, causal=causal), torch_attention(x, *weights, causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("m", [2, 4])
def test_narrow_heads_are_multihead_attention_with_more_heads(x: Tensor, causal: bool, kv_heads: int, m: int) -> None:
    """`slices=m` of h heads of width d is PyTorch's attention with h * m heads of width d / m."""
    wq, wk, wv, wo = weights_of(4, kv_heads, 8, 32)
    narrow = attention_oracle(x, wq, wk, wv, wo, causal=causal, slices=m)
    wk, wv = (w.repeat_interleave(4 // kv_heads, dim=0) for w in (wk, wv))
    wq, wk, wv = (w.reshape(4 * m, 1, 8 // m, 32) for w in (wq, wk, wv))
    torch.testing.assert_close(narrow, torch_attention(x, wq, wk, wv, wo.reshape(32, 4 * m, 1, 8 // m), causal))


def rotated(z: Tensor) -> Tensor:
    """RoPE of z[B, H, T, D] by complex numbers: pair (f, f + D/2) times exp(i t base^(-2 f / D))."""
    half = z.shape[-1] // 2
    frequency = ROPE_BASE ** (-2 * torch.arange(half, dtype=z.dtype) / z.shape[-1])
    angle = torch.arange(z.shape[-2], dtype=z.dtype)[:, None] * frequency
    turned = torch.complex(z[..., :half], z[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_oracle_is_scaled_dot_product_attention(x: Tensor, kv_heads: int, causal: bool, qk_norm: bool) -> None:
    """Grouped queries, RoPE and QK-norm from other parts: sdpa, complex numbers, `F.rms_norm`."""
    wq, wk, wv, wo = weights_of(4, kv_heads, 8, 32, parts=2)
    q, k, v = ((x @ w.reshape(-1, 32).T).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (wq, wk, wv))
    norms = {
        name: torch.linspace(0.5, 1.5 + shift, 8, dtype=x.dtype) for name, shift in (("q_norm", 0), ("k_norm", 1))
    }
    if qk_norm:
        q, k = F.rms_norm(q, (8,), norms["q_norm"], eps=1e-6), F.rms_norm(k, (8,), norms["k_norm"], eps=1e-6)
    o = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=causal, enable_gqa=True)
    expected = o.transpose(1, 2).flatten(2) @ wo.reshape(32, -1).T
    extra = {name: w.view(2, 4) for name, w in norms.items()} if qk_norm else {}
    torch.testing.assert_close(attention_oracle(x, wq, wk, wv, wo, causal=causal, rope=True, **extra), expected)


def test_narrow_heads_keep_their_pairs_angles(x: Tensor) -> None:
    """With RoPE, narrow head (h, j) is the owned features of slice j, rotated in the whole head."""
    wq, wk, wv, wo = weights_of(4, 4, 8, 32, parts=2)
    q, k, v = ((x @ w.reshape(-1, 32).T).unflatten(-1, (4, 8)).transpose(1, 2) for w in (wq, wk, wv))
    o = torch.zeros_like(v)
    for j in range(2):
        own = Grid(2, 1).owned_features(HeadLayout(4, 4, 8, rope=True), j)
        q_j, k_j, v_j = (z[..., own] for z in (rotated(q), rotated(k), v))
        o[..., own] = F.scaled_dot_product_attention(q_j, k_j, v_j, is_causal=True)
    expected = o.transpose(1, 2).flatten(2) @ wo.reshape(32, -1).T
    torch.testing.assert_close(attention_oracle(x, wq, wk, wv, wo, rope=True, slices=2), expected)
