"""Side-by-side measurements: alternatives that take turns, step by step, on the same ranks of one launch.

A round runs every alternative once in order and once in reverse (a b c c b a), so that a drift of the machine
falls on all of them alike, and the round is the sample: ratios are over pairs of one round. A step lasts from
the first rank's start to the last rank's end, by the clock that all ranks of one machine share; a barrier
before each step is not part of it.

What the ratios of `bench_model` are made of, besides the partition: the peer's collectives are the library's
own on gloo (rings of p - 1 dependent steps), Helix's are direct exchanges (`helix.comm.transport`), and with
more ranks than cores each dependent step costs a context switch of every rank. On NCCL both would use the
same collectives. They are timings of CPU ranks, and say nothing about GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from helix.attention import HelixAttention
from helix.attention.kernel import fused_attention
from helix.attention.oracle import attention_oracle
from helix.attention.schedules import ATTEND
from helix.comm.launch import launch
from helix.comm.mesh import Mesh
from helix.comm.parameters import whole
from helix.comm.stream import make_stream
from helix.models.plain import PlainTransformer
from helix.models.transformer import Transformer
from helix.parallel.tensor_parallel import tensor_parallel
from helix.partition.grid import Grid, HeadLayout
from helix.partition.options import AttentionOptions
from helix.partition.schedules import EXACT
from helix.partition.shape import TransformerShape
from helix.study.statistics import Ratio, ratio_interval, summarize
from helix.study.table import figure

Step = Callable[[], object]
Spans = dict[str, list[tuple[float, float]]]  # of one rank: (start, end) of each step, in seconds
HANG_S = 120.0  # a step of any bench takes seconds; gloo by itself would wait 30 minutes for a lost rank


@dataclass(frozen=True)
class Rounds:
    """How long to measure: `rounds` of two steps of each alternative, after `warmup` steps of each."""

    rounds: int
    warmup: int
    seed: int = 0


@dataclass(frozen=True)
class AttentionCase:
    """The attention layer to measure schedules on.

    Args:
        layout: heads; RoPE is a matter of the projections, and off here.
        width: model width E; only read with `layer`.
        layer: the whole layer, projections and residual stream's collectives included, not the core alone.
        residual: the stream's layout, with `layer`.
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
class ModelCase:
    """Helix's transformer, and the plain one under PyTorch's tensor parallelism over the same m * n ranks.

    Args:
        peers: of "plain" (residual stream on every rank) and "sequence" (cut over the sequence).
    """

    shape: TransformerShape
    grid: Grid
    options: AttentionOptions
    batch: int
    length: int
    peers: tuple[str, ...] = ("plain", "sequence")


@dataclass(frozen=True)
class Comparison:
    """What the alternatives of one launch took.

    Args:
        title: what was measured, for the table.
        tokens: per step.
        step_ms: of each round, by alternative.
        errors: relative error of each alternative's output (Frobenius norm) against attention with h heads.
        baselines: the alternatives that ratios are to.
    """

    title: str
    tokens: int
    step_ms: dict[str, list[float]]
    errors: dict[str, float]
    baselines: tuple[str, ...]

    def speed(self, name: str, baseline: str) -> Ratio:
        """How many times as fast as the baseline: its time over this one's, paired by round."""
        return ratio_interval(self.step_ms[baseline], self.step_ms[name])

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "tokens_per_step": self.tokens,
            "step_ms": {name: asdict(summarize(times)) for name, times in self.step_ms.items()},
            "relative_error": self.errors,
            "speed_ratio": {
                baseline: {name: asdict(self.speed(name, baseline)) for name in self.step_ms if name != baseline}
                for baseline in self.baselines
            },
        }

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        table.add_column("")
        for column in ("ms a step", "tokens/s", *(f"x {baseline} (95 %)" for baseline in self.baselines), "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for name in sorted(self.step_ms, key=lambda name: summarize(self.step_ms[name]).mean):
            mean = summarize(self.step_ms[name]).mean
            ratios = [self._cell(name, baseline) for baseline in self.baselines]
            error = self.errors.get(name)
            cells = (figure(mean), figure(self.tokens / mean * 1e3), *ratios, "" if error is None else f"{error:.1e}")
            table.add_row(name, *cells)
        return table

    def _cell(self, name: str, baseline: str) -> str:
        if name == baseline:
            return "1"
        speed = self.speed(name, baseline)
        return f"{speed.ratio:.2f} ({speed.ci95[0]:.2f} .. {speed.ci95[1]:.2f})"


def bench_attention(case: AttentionCase, schedules: Sequence[str], rounds: Rounds) -> Comparison:
    """Measure schedules, `perslice` among them, against `perslice`: forward, fp32, on gloo."""
    results = launch(_attention_rank, case, schedules, rounds, ranks=case.grid.ranks, timeout_s=HANG_S)
    layout = case.layout
    heads = f"{layout.heads} heads" if layout.heads == layout.kv_heads else f"{layout.heads}/{layout.kv_heads} heads"
    title = (
        f"Attention {'layer' if case.layer else 'core'}, {case.grid.name}, {heads} of {layout.head_dim}, "
        f"B={case.batch}, L={case.length}{', causal' if case.causal else ''}, forward"
    )
    errors = {name: _combine([squares[name] for _, squares in results]) for name in schedules}
    times = _step_ms([spans for spans, _ in results])
    return Comparison(title, case.batch * case.length, times, errors, ("perslice",))


def bench_model(case: ModelCase, rounds: Rounds) -> Comparison:
    """Measure Helix's model against the peers: forward, fp32, on gloo.

    Raises:
        RuntimeError: if the outputs differ by more than fp32 explains (not with `perslice`, which must differ).
    """
    results = launch(_model_rank, case, rounds, ranks=case.grid.ranks, timeout_s=HANG_S)
    shape, grid = case.shape, case.grid
    title = (
        f"Transformer, {shape.layers} layers, E={shape.width}, {shape.heads} heads of {shape.head_dim}, "
        f"MLP {shape.mlp_hidden}, B={case.batch}, L={case.length}, {grid.ranks} ranks, forward"
    )
    peers = tuple(f"TP{grid.ranks} {peer}" for peer in case.peers)
    times = _step_ms([spans for spans, _ in results])
    return Comparison(title, case.batch * case.length, times, results[0][1], peers)


def _attention_rank(case: AttentionCase, schedules: Sequence[str], rounds: Rounds) -> tuple[Spans, dict[str, Any]]:
    with torch.inference_mode():
        mesh = Mesh(case.grid)
        steps, expected = (_layer_steps if case.layer else _core_steps)(case, schedules, mesh, rounds.seed)
        squares = {name: _squares(step(), expected) for name, step in steps.items()}
        return _alternate(steps, rounds), squares


def _core_steps(
    case: AttentionCase, schedules: Sequence[str], mesh: Mesh, seed: int
) -> tuple[dict[str, Step], Tensor]:
    """Each schedule on this rank's shards of the same q, k, v, and its share of the exact result."""
    layout, m, n = case.layout, case.grid.m, case.grid.n
    generator = torch.Generator().manual_seed(seed)
    rows = layout.heads + 2 * layout.kv_heads
    drawn = torch.randn(case.batch, case.length, rows, layout.head_dim, generator=generator)
    parts = drawn.split([layout.heads, layout.kv_heads, layout.kv_heads], dim=2)
    group = [part.chunk(n, dim=2)[mesh.head.rank] for part in parts]
    exact = fused_attention(*(z.double() for z in group), case.causal)
    # One tensor cut into three, as the layer's single projection leaves them.
    shard = torch.cat(group, dim=2).chunk(m, dim=-1)[mesh.slice.rank].contiguous()
    q, k, v = shard.split([z.shape[2] for z in group], dim=2)

    def step(name: str) -> Step:
        return lambda: ATTEND[name](q, k, v, mesh.slice, case.causal)

    return {name: step(name) for name in schedules}, exact.chunk(m, dim=-1)[mesh.slice.rank]


def _layer_steps(
    case: AttentionCase, schedules: Sequence[str], mesh: Mesh, seed: int
) -> tuple[dict[str, Step], Tensor | None]:
    """Each schedule in one and the same layer; the exact result of rank 0's part of the stream, on rank 0."""
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
    # One rank is enough to see a wrong result, and the explicit scores of sixteen would fill the memory.
    expected = None
    if dist.get_rank() == 0:
        expected = attention_oracle(x, *weights, causal=case.causal).flatten(0, 1)[: own.shape[0]]
    return {name: step(name) for name in schedules}, expected


def _model_rank(case: ModelCase, rounds: Rounds) -> tuple[Spans, dict[str, float]]:
    mesh, ranks = Mesh(case.grid), case.grid.ranks
    model = Transformer(case.shape, mesh, case.options)
    model.init_weights(rounds.seed)
    generator = torch.Generator().manual_seed(rounds.seed)
    tokens = torch.randint(0, case.shape.vocab, (case.batch, case.length), generator=generator)
    steps: dict[str, Step] = {f"Helix {case.grid.m}x{case.grid.n}": lambda: model(tokens)}
    with torch.inference_mode():
        logits = model.whole_logits(model(tokens))
    errors = {}
    for peer in case.peers:
        plain = PlainTransformer(case.shape)
        plain.init_weights(rounds.seed)
        if not errors:
            with torch.inference_mode():
                single = plain(tokens).flatten(0, 1)
            errors = {next(iter(steps)): _error(logits, single)}
        tensor_parallel(plain, _one_axis(mesh), sequence=peer == "sequence")
        name = f"TP{ranks} {peer}"
        steps[name] = lambda plain=plain: plain(tokens)
        errors[name] = _error(_peer_logits(plain, tokens, case, mesh), single)
    _check_agreement(case, errors)
    with torch.inference_mode():
        return _alternate(steps, rounds), errors
