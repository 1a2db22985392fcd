"""`batch`: the m-group deals itself whole samples. All-to-all Q, K, V there, all-to-all O back.

No work is repeated and any attention kernel fits. Needs B >= m; samples are dealt unevenly if m does not
divide B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix.attention.kernel import fused_attention
from helix.attention.relayout import collect, deal
from helix.comm.mesh import Axis
from helix.partition.schedules import deal_sizes


def attend(q: Tensor, k: Tensor, v: Tensor, axis: Axis, causal: bool) -> Tensor:
    heads, kv_heads = q.shape[2], k.shape[2]
    samples = deal_sizes(q.shape[0], axis.size)
    qkv = deal(torch.cat([q, k, v], dim=2), axis, samples, "attention.qkv")  # [B@slice, T, H + 2K, D]
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    o = fused_attention(q, k, v, causal)
    return collect(o, axis, samples, "attention.out")
