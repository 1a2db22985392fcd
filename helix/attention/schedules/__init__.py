"""The schedules behind one interface: what moves inside the m-group around the core attention.

    attend(qkv, heads, axis, causal) -> o

    qkv[B, T, (H + 2K)@head, D@slice]   o[B, T, H@head, D@slice]

Q, K and V come as one tensor, the group's `heads` query heads first: as one matrix product leaves them and as
one exchange takes them, so that nothing is copied to pack them. Q and K have had QK-norm and RoPE applied.
`axis` is the slice axis, the m ranks of one head group. Which schedule can run where, and which of them equal
the attention they partition, is `helix.partition.schedules`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from helix.attention.schedules import batch, gather, heads, perslice, rows, score
from helix.comm.mesh import Axis


class Attend(Protocol):
    def __call__(self, qkv: Tensor, heads: int, axis: Axis, causal: bool) -> Tensor: ...


ATTEND: dict[str, Attend] = {
    "perslice": perslice.attend,
    "batch": batch.attend,
    "heads": heads.attend,
    "rows": rows.attend,
    "gather": gather.attend,
    "score": score.attend,
}
