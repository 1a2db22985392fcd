"""`batch`: the m-group deals itself whole samples. All-to-all Q, K, V there, all-to-all O back.

No work is repeated and any attention kernel fits. Needs B >= m; samples are dealt unevenly if m does not
divide B.
"""

from __future__ import annotations

from torch import Tensor

from helix.attention.kernel import fused_attention, unpack
from helix.attention.relayout import collect, deal
from helix.comm.mesh import Axis
from helix.comm.record import phase
from helix.partition.schedules import deal_sizes


def attend(qkv: Tensor, heads: int, axis: Axis, causal: bool) -> Tensor:
    samples = deal_sizes(qkv.shape[0], axis.size)
    with phase("attention.pack"):
        qkv = deal(qkv, axis, samples, "attention.qkv")  # [B@slice, T, H + 2K, D]
    o = fused_attention(*unpack(qkv, heads), causal)
    with phase("attention.unpack"):
        return collect(o, axis, samples, "attention.out")
