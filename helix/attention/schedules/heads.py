"""`heads`: the m-group deals itself whole heads (as Ulysses does over the sequence). Same volume as `batch`.

Needs m to divide the group's query heads and its key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix.attention.kernel import fused_attention, unpack
from helix.attention.relayout import collect, deal
from helix.comm.mesh import Axis
from helix.comm.record import phase


def attend(qkv: Tensor, heads: int, axis: Axis, causal: bool) -> Tensor:
    m = axis.size
    with phase("attention.pack"):
        # Rank r is dealt the r-th m-th of the query heads and of the key/value heads that they attend to.
        shares = [z.unflatten(2, (m, -1)).movedim(2, 0) for z in unpack(qkv, heads)]
        qkv = deal(torch.cat(shares, dim=3), axis, [1] * m, "attention.qkv").squeeze(0)  # [B, T, (H + 2K)/m, D]
    o = fused_attention(*unpack(qkv, heads // m), causal)
    with phase("attention.unpack"):
        out = collect(o.unsqueeze(0), axis, [1] * m, "attention.out")  # [m, B, T, H/m, D@slice]
        return out.movedim(0, 2).flatten(2, 3)
