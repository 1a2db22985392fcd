"""`gather`: all-gather Q and K; V stays sliced, and so does the output.

Every rank of the m-group repeats the scores, m times the work of one, and its own slice of P V: (1 + m) / 2
times the core FLOPs of one head group, on m ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix.attention.kernel import fused_attention
from helix.comm import collectives
from helix.comm.mesh import Axis


def attend(q: Tensor, k: Tensor, v: Tensor, axis: Axis, causal: bool) -> Tensor:
    if axis.size > 1:
        heads, kv_heads = q.shape[2], k.shape[2]
        qk = torch.cat([q, k], dim=2).unsqueeze(0)
        qk = collectives.all_gather(qk, axis, "attention.qk").movedim(0, -2).flatten(-2)  # [B, T, H + K, D]
        q, k = qk.split([heads, kv_heads], dim=2)
    return fused_attention(q, k, v, causal)
