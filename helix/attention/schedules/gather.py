"""`gather`: all-gather Q and K; V stays sliced, and so does the output.

Every rank of the m-group repeats the scores, m times the work of one, and its own slice of P V: (1 + m) / 2
times the core FLOPs of one head group, on m ranks.
"""

from __future__ import annotations

from torch import Tensor

from helix.attention.kernel import fused_attention, unpack
from helix.comm import collectives
from helix.comm.mesh import Axis
from helix.comm.record import phase


def attend(qkv: Tensor, heads: int, axis: Axis, causal: bool) -> Tensor:
    if axis.size == 1:
        return fused_attention(*unpack(qkv, heads), causal)
    kv_heads = (qkv.shape[2] - heads) // 2
    qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
    with phase("attention.pack"):
        qk = collectives.all_gather(qk.unsqueeze(0), axis, "attention.qk").movedim(0, -2).flatten(-2)  # [.., D]
    return fused_attention(qk[:, :, :heads], qk[:, :, heads:], v, causal)
