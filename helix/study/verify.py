"""`helix.verify`: one attention layer on ranks, held against one device, every schedule in one launch.

    helix.verify(Grid(m=2, n=2), heads=4, head_dim=8)

Weights are named and laid out as `helix.attention.oracle` has them, so that the same mapping goes to both:

    attend_on_ranks(grid, x, weights)     attention_oracle(x, **weights)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.attention.layer import HelixAttention
from helix.attention.oracle import attention_oracle
from helix.comm.launch import launch
from helix.comm.mesh import Mesh
from helix.comm.parameters import fill
from helix.comm.record import record
from helix.partition import wire
from helix.partition.cost import AttentionCost, cheapest_schedule
from helix.partition.grid import Grid, HeadLayout, PartitionError
from helix.partition.schedules import check_schedule, legal_schedules
from helix.study.accuracy import relative_error

HANG_S = 60.0  # a pass takes seconds at most; gloo by itself would wait 30 minutes for a lost rank
Bytes = tuple[dict[str, int], ...]  # by rank, and by "collective/name"


@dataclass(frozen=True)
class Attended:
    """What ranks made of one attention layer with one schedule.

    Args:
        schedule: that ran; not "auto".
        output: [B, T, E], of rank 0; the stream is replicated, so every rank has it.
        sent: bytes that left each rank, counted.
        predicted: the same by the closed forms.
    """

    schedule: str
    output: Tensor
    sent: Bytes
    predicted: Bytes


@dataclass(frozen=True)
class Verified:
    """How far one schedule is from the two functions that it may be.

    Args:
        schedule, sent, predicted: as in `Attended`.
        error: relative, to attention with its h heads on one device in fp64.
        narrow_error: relative, to attention with h * m heads of width d / m, the papers' formula.
    """

    schedule: str
    error: float
    narrow_error: float
    sent: Bytes
    predicted: Bytes


def verify(
    grid: Grid,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int = 64,
    *,
    batch: int = 2,
    length: int = 32,
    causal: bool = True,
    rope: bool = False,
    qk_norm: bool = False,
    schedules: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Verified]:
    """Run one layer with random weights of width heads * head_dim on the grid's ranks, by each schedule.

    Args:
        schedules: names, or "auto"; None for every legal one.
        dtype: that the ranks compute in.

    Raises:
        PartitionError: before anything is launched, if the grid or a schedule does not fit these heads.
    """
    layout = HeadLayout(heads, kv_heads or heads, head_dim, rope)
    if min(batch, length) < 1:
        raise PartitionError(f"batch and length must be at least 1, not {batch} and {length}")
    x, weights = _drawn(layout, batch, length, qk_norm, dtype, seed)
    found = attend_on_ranks(grid, x, weights, schedules=schedules, causal=causal, rope=rope)
    exact = {name: weight.double() for name, weight in weights.items()}
    whole, narrow = (
        attention_oracle(x.double(), **exact, causal=causal, rope=rope, slices=slices) for slices in (1, grid.m)
    )
    return [
        Verified(
            one.schedule,
            relative_error(one.output, whole),
            relative_error(one.output, narrow),
            one.sent,
            one.predicted,
        )
        for one in found
    ]


def attend_on_ranks(
    grid: Grid,
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    schedules: Sequence[str] | None = None,
    causal: bool = True,
    rope: bool = False,
) -> list[Attended]:
    """Run whole weights on the grid's ranks, each of which keeps its own 1 / (m n) of them.

    Args:
        x: [B, T, E].
        weights: wq[H, P, D/P, E], wk and wv[K, P, D/P, E], wo[E, H, P, D/P] with P = 2 with RoPE, else 1; also
            q_norm and k_norm[P, D/P] where there is QK-norm.
        schedules: names, or "auto"; None for every legal one.

    Raises:
        PartitionError: before anything is launched, if the grid or a schedule does not fit these weights.
    """
    if missing := [name for name in ("wq", "wk", "wv", "wo") if name not in weights]:
        raise PartitionError(f"the layer needs weights wq, wk, wv and wo; {', '.join(missing)} is not among them")
    heads, parts, run, _ = weights["wq"].shape
    layout = HeadLayout(heads, weights["wk"].shape[0], parts * run, rope)
    if parts != layout.parts:
        raise PartitionError(
            f"rope={rope} takes weights of {layout.parts} parts a head, wq[H, P, D/P, E], not {parts}"
        )
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, rope)
    names = [
        _named(name, layout, grid, x, causal) for name in schedules or legal_schedules(layout, grid, *x.shape[:2])
    ]
    results = launch(_on_rank, grid, x, dict(weights), names, causal, rope, ranks=grid.ranks, timeout_s=HANG_S)
    return [
        Attended(name, results[0][0][place], tuple(sent[place] for _, sent in results), predicted)
        for place, name in enumerate(names)
        for predicted in [_predicted(layout, grid, name, x, causal, "q_norm" in weights)]
    ]


def _named(schedule: str, layout: HeadLayout, grid: Grid, x: Tensor, causal: bool) -> str:
    batch, length, _ = x.shape
    check_schedule(schedule, layout, grid, batch, length)
    return cheapest_schedule(layout, grid, batch, length, causal, x.itemsize) if schedule == "auto" else schedule


def _drawn(
    layout: HeadLayout, batch: int, length: int, qk_norm: bool, dtype: torch.dtype, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """x and weights; each projection keeps the variance of what it is given."""
    generator = torch.Generator().manual_seed(seed)
    width, parts, run = layout.heads * layout.head_dim, layout.parts, layout.head_dim // layout.parts

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(batch, length, width)
    counts = {"wq": layout.heads, "wk": layout.kv_heads, "wv": layout.kv_heads}
    weights = {name: draw(count, parts, run, width) * width**-0.5 for name, count in counts.items()}
    weights["wo"] = draw(width, layout.heads, parts, run) * width**-0.5
    if qk_norm:
        weights |= {name: 1 + 0.3 * draw(parts, run) for name in ("q_norm", "k_norm")}
    return x.to(dtype), {name: weight.to(dtype) for name, weight in weights.items()}


@torch.inference_mode()
def _on_rank(
    grid: Grid, x: Tensor, weights: dict[str, Tensor], schedules: list[str], causal: bool, rope: bool
) -> tuple[list[Tensor], list[dict[str, int]]]:
    """Each schedule's output, on rank 0 alone, and the bytes that this rank sent for it."""
    mesh, (heads, parts, run, width) = Mesh(grid), weights["wq"].shape
    layer = HelixAttention(
        width,
        heads,
        weights["wk"].shape[0],
        parts * run,
        mesh=mesh,
        causal=causal,
        rope=rope,
        qk_norm="q_norm" in weights,
        dtype=x.dtype,
        initialize=False,
    )
    for name, parameter in layer.named_parameters():
        fill(parameter, weights[name])
    outputs, sent = [], []
    for name in schedules:
        layer.schedule = name
        with record() as log:
            y = layer(x)
        outputs.append(y if mesh.model.rank == 0 else y[:0])
        sent.append(dict(log.bytes))
    return outputs, sent


def _predicted(layout: HeadLayout, grid: Grid, schedule: str, x: Tensor, causal: bool, qk_norm: bool) -> Bytes:
    batch, length, width = x.shape
    cost = AttentionCost(layout, grid, schedule, batch, length, causal, x.itemsize)
    out = []
    for rank in range(grid.ranks):
        moved = cost.bytes(grid.coordinates(rank)[1], qk_norm)
        # Every rank adds its rows of W_O to the replicated stream.
        moved["all_reduce/attention.leave"] = wire.all_reduce(batch * length * width, grid.ranks, x.itemsize)
        out.append(dict(+Counter(moved)))
    return tuple(out)
