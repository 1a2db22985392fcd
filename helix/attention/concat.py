"""The papers' end of the layer: the concatenation of all partitions' outputs, on every rank.

Hierarchical as they describe it (over the slices of a head group, then over the groups), or flat (one
all-gather over all m * n ranks). Both move (m n - 1) / (m n) of the output to each rank; the hierarchy alone
saves no traffic. Source: papers, "Aggregation of Results".
"""

from __future__ import annotations

from torch import Tensor

from helix.comm import collectives
from helix.comm.mesh import Axis


def concat_hierarchical(o: Tensor, slices: Axis, groups: Axis) -> Tensor:
    """o[N, H@head, P, (D/P)@slice] -> [N, H, P, D/P]: first over slices, then over head groups."""
    whole_heads = collectives.gather(o.unsqueeze(0), slices, "attention.concat_slices")
    whole_heads = whole_heads.movedim(0, -2).flatten(-2)  # [N, H@head, P, D/P]
    whole = collectives.gather(whole_heads.unsqueeze(0), groups, "attention.concat_heads")
    return whole.movedim(0, 1).flatten(1, 2)


def concat_flat(o: Tensor, model: Axis, m: int) -> Tensor:
    """o[N, H@head, P, (D/P)@slice] -> [N, H, P, D/P] in one all-gather over the model axis."""
    blocks = collectives.gather(o.unsqueeze(0), model, "attention.concat")  # [n * m, N, H/n, P, D/P/m]
    return blocks.unflatten(0, (-1, m)).permute(2, 0, 3, 4, 1, 5).flatten(-2).flatten(1, 2)
