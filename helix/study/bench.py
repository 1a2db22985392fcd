"""What `python -m helix bench` measures: schedules against each other, and the model against its peer.

What the ratios of `bench_model` are made of, besides the partition: the peer runs PyTorch's tensor
parallelism through DTensor, and its collectives are gloo's own, rings of p - 1 dependent steps; Helix runs
plain local tensors, and its collectives on gloo are direct exchanges (`helix.comm.transport`). With more ranks
than cores every dependent step costs a context switch of every rank. The peer "helix" (Helix itself on a
1 x (m n) grid, plain head parallelism) shares all of that with Helix, so the ratio to it is the partition's
alone. These are timings of CPU ranks; they say nothing about GPUs, where both would use NCCL's collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
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
from helix.partition.shape import TransformerShape
from helix.study.alternate import Comparison, Rounds, Spans, Step, alternate, step_ms

HANG_S = 120.0  # a step takes seconds at most; gloo by itself would wait 30 minutes for a lost rank
# fp32 keeps 7 digits; sums in another order over a few layers lose one or two of them.
AGREEMENT = 1e-5
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
class ModelCase:
    """Helix's transformer and its peers, over the same m * n ranks.

    Args:
        peers: "plain" (PyTorch's tensor parallelism, residual stream on every rank), "sequence" (the same, the
            stream cut over the sequence) and "helix" (Helix on a 1 x (m n) grid).
    """

    shape: TransformerShape
    grid: Grid
    options: AttentionOptions
    batch: int
    length: int
    peers: tuple[str, ...]


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


def bench_model(case: ModelCase, rounds: Rounds) -> Comparison:
    """Measure Helix's model against the peers: forward, fp32, on gloo.

    Raises:
        RuntimeError: if the outputs differ by more than fp32 explains.
    """
    results = launch(_model_rank, case, rounds, ranks=case.grid.ranks, timeout_s=HANG_S)
    shape = case.shape
    title = (
        f"Transformer, {shape.layers} layers, E={shape.width}, {shape.heads} heads of {shape.head_dim}, "
        f"MLP {shape.mlp_hidden}, B={case.batch}, L={case.length}, {case.grid.ranks} ranks, forward"
    )
    times, errors = step_ms([spans for spans, _ in results]), results[0][1]
    _, *peers = times
    return Comparison(title, case.batch * case.length, times, errors, tuple(peers))


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
def _model_rank(case: ModelCase, rounds: Rounds) -> tuple[Spans, dict[str, float]]:
    generator = torch.Generator().manual_seed(rounds.seed)
    tokens = torch.randint(0, case.shape.vocab, (case.batch, case.length), generator=generator)
    single = PlainTransformer(case.shape)
    single.init_weights(rounds.seed)
    exact = single(tokens).flatten(0, 1)
    steps, errors = {}, {}
    for name, step, logits in _models(case, tokens, rounds.seed):
        steps[name] = step
        errors[name] = float((logits - exact).norm() / exact.norm())
        if errors[name] > AGREEMENT:
            raise RuntimeError(f"{name} differs from the model on one device by {errors[name]:.1e} (relative error)")
    return alternate(steps, rounds), errors


def _models(case: ModelCase, tokens: Tensor, seed: int) -> list[tuple[str, Step, Tensor]]:
    """Name, step and whole logits of Helix's model, then of its peers."""
    ranks = case.grid.ranks
    heads = Mesh(Grid(1, ranks))  # the grid of plain tensor parallelism
    models = [_helix(case, Mesh(case.grid), tokens, seed)]
    for peer in case.peers:
        if peer == "helix":
            models.append(_helix(case, heads, tokens, seed))
            continue
        plain = PlainTransformer(case.shape)
        plain.init_weights(seed)
        tensor_parallel(plain, heads.device_mesh["head"], sequence=peer == "sequence")
        models.append((f"TP{ranks} {peer}", _step(plain, tokens), _whole(plain(tokens), heads, case.shape.vocab)))
    return models


def _helix(case: ModelCase, mesh: Mesh, tokens: Tensor, seed: int) -> tuple[str, Step, Tensor]:
    model = Transformer(case.shape, mesh, case.options)
    model.init_weights(seed)
    return f"Helix {mesh.grid.m}x{mesh.grid.n}", _step(model, tokens), model.whole_logits(model(tokens))


def _step(model: torch.nn.Module, tokens: Tensor) -> Step:
    return lambda: model(tokens)


def _whole(logits: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """logits[B, T, V@head] -> [B * T, V]."""
    flat = logits.flatten(0, 1)
    shape = torch.Size((flat.shape[0], vocab))
    cut = DTensor.from_local(
        flat, mesh.device_mesh["head"], [Shard(1)], run_check=False, shape=shape, stride=(vocab, 1)
    )
    return cut.full_tensor()
