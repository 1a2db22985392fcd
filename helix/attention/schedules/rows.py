"""`rows`: the m-group deals itself query rows; all-gather K, V. Works with one head and one sample.

Causal rows are dealt zig-zag (`helix.partition.schedules.row_chunks`). Needs T >= m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix.attention.kernel import fused_attention
from helix.attention.relayout import collect, deal
from helix.comm import collectives
from helix.comm.mesh import Axis
from helix.comm.record import phase
from helix.partition.schedules import row_chunks


def attend(qkv: Tensor, heads: int, axis: Axis, causal: bool) -> Tensor:
    q, kv = qkv[:, :, :heads], qkv[:, :, heads:]
    chunks = row_chunks(q.shape[1], axis.size, causal)
    sizes = [sum(map(len, mine)) for mine in chunks]
    order = torch.tensor([t for mine in chunks for run in mine for t in run], device=q.device)
    with phase("attention.pack"):
        rows = deal(q.movedim(1, 0)[order], axis, sizes, "attention.q").movedim(0, 1)  # [B, T@slice, H, D]
        keys, values = _gather_features(kv, axis).chunk(2, dim=2)  # [B, S, K, D] each
    outputs, start = [], 0
    for run in chunks[axis.rank]:
        visible = run.stop if causal else q.shape[1]
        piece = rows[:, start : start + len(run)]
        outputs.append(fused_attention(piece, keys[:, :visible], values[:, :visible], causal))
        start += len(run)
    with phase("attention.unpack"):
        out = collect(torch.cat(outputs, dim=1).movedim(1, 0), axis, sizes, "attention.out")
        return out[order.argsort()].movedim(0, 1)


def _gather_features(x: Tensor, axis: Axis) -> Tensor:
    """x[.., D@slice] -> [.., D], slice by slice."""
    if axis.size == 1:
        return x
    return collectives.all_gather(x.unsqueeze(0), axis, "attention.kv").movedim(0, -2).flatten(-2)
