"""The schedules behind one interface: what moves inside the m-group around the core attention.

    attend(q, k, v, axis, causal) -> o

    q[B, T, H@head, D@slice]   k, v[B, T, K@head, D@slice]   o[B, T, H@head, D@slice]

`axis` is the slice axis, the m ranks of one head group. q and k have had QK-norm and RoPE applied. Which
schedule can run where, and which of them equal the attention they partition, is `helix.partition.schedules`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from helix.attention.schedules import batch, gather, heads, perslice, rows, score
from helix.comm.mesh import Axis


class Attend(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, axis: Axis, causal: bool) -> Tensor: ...


ATTEND: dict[str, Attend] = {
    "perslice": perslice.attend,
    "batch": batch.attend,
    "heads": heads.attend,
    "rows": rows.attend,
    "gather": gather.attend,
    "score": score.attend,
}
