"""Whole weights in, one attention layer on ranks, its output and its bytes out: for notebooks and by hand.

    attend_on_ranks(grid, x, weights)     attention_oracle(x, **weights)

take the same weights, by the names and in the layout of `helix.attention.oracle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.attention.layer import HelixAttention
from helix.comm.mesh import Mesh
from helix.comm.parameters import fill
from helix.comm.record import record
from helix.partition import wire
from helix.partition.cost import AttentionCost
from helix.partition.grid import Grid, HeadLayout
from helix.partition.schedules import check_schedule, legal_schedules
from helix.ranks.launch import launch

HANG_S = 60.0  # a pass takes seconds at most; gloo by itself would wait 30 minutes for a lost rank
Bytes = dict[str, int]  # by "collective/name"


@dataclass(frozen=True)
class Attended:
    """One schedule's output[B, T, E], and the bytes that each rank sent for it: counted, and by the closed forms."""

    output: Tensor
    sent: list[Bytes]
    predicted: list[Bytes]


def attend_on_ranks(
    grid: Grid,
    x: Tensor,
    weights: Mapping[str, Tensor],
    schedules: Sequence[str] = (),
    *,
    causal: bool = True,
    rope: bool = False,
) -> dict[str, Attended]:
    """Run x[B, T, E] through a layer of which each rank of the grid holds its own 1 / (m n), by each schedule.

    Args:
        weights: wq[H, P, D/P, E], wk and wv[K, P, D/P, E], wo[E, H, P, D/P].
        schedules: names, not "auto"; every legal one if empty.

    Raises:
        PartitionError: before anything is launched, if the grid or a schedule does not fit these weights.
    """
    heads, parts, run, _ = weights["wq"].shape
    batch, length, width = x.shape
    layout = HeadLayout(heads, weights["wk"].shape[0], parts * run, rope)
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, rope)
    names = list(schedules) or legal_schedules(layout, grid, batch, length)
    for name in names:
        check_schedule(name, layout, grid, batch, length)
    found = launch(_on_rank, grid, layout, x, dict(weights), names, causal, ranks=grid.ranks, timeout_s=HANG_S)
    # Every rank adds its rows of W_O to the replicated stream.
    left = {"all_reduce/attention.leave": wire.all_reduce(batch * length * width, grid.ranks, x.itemsize)}
    costs = {name: AttentionCost(layout, grid, name, batch, length, causal, x.itemsize) for name in names}
    slices = [grid.coordinates(rank)[1] for rank in range(grid.ranks)]
    return {
        name: Attended(
            found[0][name][0],
            [rank[name][1] for rank in found],
            [dict(cost.bytes(j)) | (left if grid.ranks > 1 else {}) for j in slices],
        )
        for name, cost in costs.items()
    }


@torch.inference_mode()
def _on_rank(
    grid: Grid, layout: HeadLayout, x: Tensor, weights: dict[str, Tensor], schedules: list[str], causal: bool
) -> dict[str, tuple[Tensor, Bytes]]:
    mesh, sizes = Mesh(grid), (layout.heads, layout.kv_heads, layout.head_dim)
    layer = HelixAttention(
        x.shape[-1], *sizes, mesh=mesh, causal=causal, rope=layout.rope, dtype=x.dtype, initialize=False
    )
    for name, parameter in layer.named_parameters():
        fill(parameter, weights[name])
    out = {}
    for name in schedules:
        layer.schedule = name
        with record() as log:
            output = layer(x)
        out[name] = (output, dict(log.bytes))
    return out
