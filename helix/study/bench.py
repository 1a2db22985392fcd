"""What `python -m helix bench` measures: schedules, and the two ends of the papers' layer, against each other.

All run on the same forked ranks of one machine, over gloo, whose collectives are here direct exchanges
(`helix.comm.transport`). With more ranks than cores every step that waits for another rank costs a context
switch of every rank. These are timings of CPU ranks; they say nothing about GPUs, which use NCCL's collectives.
Helix against its rivals on whole models: `infer.py baseline=[..]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from helix.attention import HelixAttention
from helix.attention.concat import concat_flat, concat_hierarchical
from helix.attention.kernel import fused_attention
from helix.attention.oracle import attention_oracle
from helix.attention.schedules import ATTEND
from helix.comm.mesh import Mesh
from helix.comm.parameters import whole
from helix.comm.record import record
from helix.comm.stream import make_stream
from helix.partition.grid import Grid, HeadLayout
from helix.ranks.launch import launch
from helix.study.alternate import Comparison, Rounds, Spans, Step, alternate, step_ms

HANG_S = 120.0  # a step takes seconds at most; gloo by itself would wait 30 minutes for a lost rank
Squares = tuple[float, float]  # squared norms of a rank's error and of its exact result


@dataclass(frozen=True)
class AttentionCase:
    """The attention to measure schedules on.

    Args:
        layout: its heads. RoPE belongs to the projections, and would take the same time in every schedule.
        width: model width E; read only with `layer`.
        layer: the whole layer, projections and the residual stream's collectives included, not the core alone.
        residual: the stream's layout; read only with `layer`.
    """

    layout: HeadLayout
    grid: Grid
    batch: int
    length: int
    causal: bool = True
    width: int = 0
    layer: bool = False
    residual: str = "sharded"


@dataclass(frozen=True)
class ConcatCase:
    """The attention outputs o[B * T, H@head, D@slice], fp32, that every rank wants whole."""

    heads: int
    head_dim: int
    grid: Grid
    batch: int
    length: int

    @property
    def output_bytes(self) -> int:
        return self.batch * self.length * self.heads * self.head_dim * torch.float32.itemsize


@dataclass(frozen=True)
class Claim:
    """What a paper says, word for word, and where."""

    sentence: str
    paper: str
    section: str


_HELIX_PAPER = "Helix: Two-Level Attention Partitioning for Large-Scale Transformer Deployment"
# All that the papers say of what the hierarchy saves.
HIERARCHY_CLAIMS = (
    Claim(
        "Hierarchical reduction minimizes communication overhead",
        "Two-Level Attention Partitioning for Large-Scale Transformers: A Concise Version",
        "Communication Pattern",
    ),
    Claim(
        "After dimension-wise concatenation, final head groups' outputs are concatenated without additional "
        "communication if placed accordingly.",
        _HELIX_PAPER,
        "Communication and Synchronization",
    ),
    Claim(
        "This hierarchical partitioning reduces communication overhead compared to naive full-dimension splits.",
        _HELIX_PAPER,
        "Communication and Synchronization",
    ),
)


@dataclass(frozen=True)
class ConcatComparison(Comparison):
    """Hierarchical and flat concatenation, with what they moved.

    Args:
        case: what was concatenated.
        executed_bytes: bytes that left one rank in one step, by alternative and "collective/name".
    """

    case: ConcatCase
    executed_bytes: dict[str, dict[str, int]]

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {
            "output_bytes": self.case.output_bytes,
            "executed_bytes_per_rank_per_step": self.executed_bytes,
            "claims": [asdict(claim) for claim in HIERARCHY_CLAIMS],
        }

    def table(self) -> Table:
        table, ranks = super().table(), self.case.grid.ranks
        lines = [f"A rank holds 1/{ranks} of the output's {self.case.output_bytes:,} bytes. In a step it sends:"]
        for name, moved in self.executed_bytes.items():
            total, parts = sum(moved.values()), (f"{key.split('.')[-1]} {count:,}" for key, count in moved.items())
            lines.append(f"{name} {total:,} bytes, {total / self.case.output_bytes:.6g} of it ({', '.join(parts)})")
        lines.append("What the papers say:")
        lines += [f'"{claim.sentence}" ({claim.paper}; {claim.section})' for claim in HIERARCHY_CLAIMS]
        table.caption = "\n".join(lines)
        return table


def bench_attention(case: AttentionCase, schedules: Sequence[str], rounds: Rounds) -> Comparison:
    """Measure schedules, `perslice` among them, against `perslice`: forward, fp32, on gloo."""
    results = launch(_attention_rank, case, schedules, rounds, ranks=case.grid.ranks, timeout_s=HANG_S)
    layout = case.layout
    heads = f"{layout.heads} heads" if layout.heads == layout.kv_heads else f"{layout.heads}/{layout.kv_heads} heads"
    title = (
        f"Attention {'layer' if case.layer else 'core'}, {case.grid.name}, {heads} of {layout.head_dim}, "
        f"B={case.batch}, L={case.length}{', causal' if case.causal else ''}, forward"
    )
    errors = {}
    for name in schedules:
        difference, norm = (sum(part) for part in zip(*(squares[name] for _, squares in results), strict=True))
        errors[name] = (difference / norm) ** 0.5
    times = step_ms([spans for spans, _ in results])
    return Comparison(title, case.batch * case.length, times, errors, ("perslice",))


def bench_concat(case: ConcatCase, rounds: Rounds) -> ConcatComparison:
    """Measure the papers' hierarchical concatenation against one flat all-gather: fp32, on gloo.

    Raises:
        RuntimeError: if either differs from the whole in any bit.
    """
    results = launch(_concat_rank, case, rounds, ranks=case.grid.ranks, timeout_s=HANG_S)
    title = (
        f"Concatenation of attention outputs, {case.grid.name}, {case.heads} heads of {case.head_dim}, "
        f"B={case.batch}, L={case.length}"
    )
    times, executed = step_ms([spans for spans, _ in results]), results[0][1]
    errors = dict.fromkeys(times, 0.0)  # each rank has compared every bit
    return ConcatComparison(title, case.batch * case.length, times, errors, ("flat",), case, executed)


@torch.inference_mode()
def _attention_rank(case: AttentionCase, schedules: Sequence[str], rounds: Rounds) -> tuple[Spans, dict[str, Squares]]:
    mesh = Mesh(case.grid)
    steps, exact = (_layer_steps if case.layer else _core_steps)(case, schedules, mesh, rounds.seed)
    squares = {}
    for name, step in steps.items():
        error = step().double() - exact
        squares[name] = (error.square().sum().item(), exact.square().sum().item())
    return alternate(dict(steps), rounds), squares


def _core_steps(
    case: AttentionCase, schedules: Sequence[str], mesh: Mesh, seed: int
) -> tuple[dict[str, Step], Tensor]:
    """Each schedule on this rank's shards of the same q, k, v, and its share of the exact result."""
    layout, m, n = case.layout, case.grid.m, case.grid.n
    heads = [layout.heads, layout.kv_heads, layout.kv_heads]
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(case.batch, case.length, sum(heads), layout.head_dim, generator=generator)
    group = [z.chunk(n, dim=2)[mesh.head.rank] for z in qkv.split(heads, dim=2)]
    q, k, v = (z.double() for z in group)
    exact = fused_attention(q, k, v, case.causal)
    # One tensor, as the layer's single projection leaves it.
    shard = torch.cat(group, dim=2).chunk(m, dim=-1)[mesh.slice.rank].contiguous()

    def step(name: str) -> Step:
        return lambda: ATTEND[name](shard, layout.heads // n, mesh.slice, case.causal)

    return {name: step(name) for name in schedules}, exact.chunk(m, dim=-1)[mesh.slice.rank]


def _layer_steps(
    case: AttentionCase, schedules: Sequence[str], mesh: Mesh, seed: int
) -> tuple[dict[str, Step], Tensor]:
    """Each schedule in one and the same layer, and this rank's part of the exact residual stream."""
    layout, shape = case.layout, (case.batch, case.length)
    stream = make_stream(case.residual, mesh.model)
    layer = HelixAttention(
        case.width, layout.heads, layout.kv_heads, layout.head_dim, mesh=mesh, causal=case.causal, stream=stream
    )
    layer.init_weights(seed)
    x = torch.randn(*shape, case.width, generator=torch.Generator().manual_seed(seed))
    own = stream.leave_whole(x.flatten(0, 1), "bench")

    def step(name: str) -> Step:
        def run() -> Tensor:
            layer.schedule = name
            return layer(own, shape)

        return run

    weights = [whole(w) for w in (layer.wq, layer.wk, layer.wv, layer.wo) if w is not None]
    # Explicit scores of every rank at once would fill the memory.
    exact = x.new_empty(x.shape)
    if dist.get_rank() == 0:
        exact = attention_oracle(x, *weights, causal=case.causal)
    dist.broadcast(exact, 0)
    return {name: step(name) for name in schedules}, stream.leave_whole(exact.flatten(0, 1), "bench")


@torch.inference_mode()
def _concat_rank(case: ConcatCase, rounds: Rounds) -> tuple[Spans, dict[str, dict[str, int]]]:
    mesh = Mesh(case.grid)
    generator = torch.Generator().manual_seed(rounds.seed)
    # One run of features a slice (P = 1), as without RoPE: [N, H, P, D].
    exact = torch.randn(case.batch * case.length, case.heads, 1, case.head_dim, generator=generator)
    group = exact.chunk(case.grid.n, dim=1)[mesh.head.rank]
    own = group.chunk(case.grid.m, dim=-1)[mesh.slice.rank].contiguous()
    steps: dict[str, Step] = {
        "hierarchical": lambda: concat_hierarchical(own, mesh.slice, mesh.head),
        "flat": lambda: concat_flat(own, mesh.model, case.grid.m),
    }
    executed = {}
    for name, step in steps.items():
        with record() as log:
            output = step()
        executed[name] = dict(log.bytes)
        if not torch.equal(output, exact):
            raise RuntimeError(f"the {name} concatenation is not the whole output")
    return alternate(steps, rounds), executed
