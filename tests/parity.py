"""One case of partitioned attention held against the oracle: output, every gradient, every byte."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from helix import Grid, HelixAttention
from helix.attention.oracle import attention_oracle, block_weights
from helix.comm.mesh import Mesh
from helix.comm.parameters import fill
from helix.comm.record import Log, record
from helix.comm.stream import make_stream
from helix.partition import wire
from helix.partition.cost import AttentionCost
from helix.partition.grid import HeadLayout

# Measured on all cases of the tests: at most 2e-14 and 1e-6. The partitioned layer adds the same numbers in
# another order, so its error is a few roundings times the length of the sums (up to 5,000 terms): 1e-16 * 1e4
# is well inside 1e-10 for fp64, and 1e-5 for fp32 is DESIGN's bound, some 80 roundings of 1.2e-7.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
VANISHING = 1e-9  # beside the largest gradient: rounding is all that is there of what should be zero

NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Attention:
    """A function: what the single device computes. `width` None means heads * head_dim."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    rope: bool = False
    qk_norm: bool = False
    projects: bool = True
    batch: int = 3
    length: int = 7
    width: int = 24

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(self.heads, self.kv_heads, self.head_dim, self.rope)


@dataclass(frozen=True)
class Case:
    """A function and one way to compute it on a grid."""

    attention: Attention
    schedule: str
    concat: str = "hierarchical"
    projection: str = "column"
    stream: str = "replicated"
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Result:
    """What one rank found: errors relative to the largest reference value, and the bytes it sent."""

    errors: dict[str, float]
    forward: dict[str, int]
    backward: dict[str, int]


@dataclass(frozen=True)
class Reference:
    """Inputs, and what the oracle makes of them in fp64; every number of the inputs is exact in fp32."""

    x: Tensor  # [N, E]
    grad: Tensor  # [N, E], of the output
    weights: dict[str, Tensor]
    y: Tensor  # [N, E]
    gradients: dict[str, Tensor]  # of x and of every weight


@cache
def reference(attention: Attention, slices: int = 1, blocks: Grid | None = None) -> Reference:
    """The oracle's answer; once for all schedules. `blocks`: the grid of `projection=block`."""
    a, generator = attention, torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    parts, run = a.layout.parts, a.head_dim // a.layout.parts
    columns = a.width // blocks.ranks if blocks else a.width
    weights = {
        name: draw(heads, parts, run, columns) * columns**-0.5
        for name, heads in (("wq", a.heads), ("wk", a.kv_heads), ("wv", a.kv_heads))
    }
    if a.projects:
        weights["wo"] = draw(a.width, a.heads, parts, run) * (a.heads * a.head_dim) ** -0.5
    if a.qk_norm:
        weights |= {name: 1 + 0.3 * draw(parts, run) for name in NORMS}
    # The layer is told the numbers in fp32 too, so round after scaling.
    weights = {name: w.float().double().requires_grad_() for name, w in weights.items()}
    x = draw(a.batch, a.length, a.width).requires_grad_()
    dense = dict(weights)
    if blocks:
        dense |= {name: block_weights(weights[name], a.heads, blocks.m, blocks.n) for name in ("wq", "wk", "wv")}
    y = attention_oracle(x, **dense, causal=a.causal, rope=a.rope, slices=slices)
    grad = draw(*y.shape)
    found = torch.autograd.grad(y, [x, *weights.values()], grad)
    return Reference(
        x.detach().flatten(0, 1),
        grad.flatten(0, 1),
        {name: w.detach() for name, w in weights.items()},
        y.detach().flatten(0, 1),
        {"x": found[0].flatten(0, 1), **dict(zip(weights, found[1:], strict=True))},
    )


def check(case: Case, mesh: Mesh | None) -> Result:
    """Run one case on this rank and compare."""
    a, grid = case.attention, mesh.grid if mesh else Grid(1, 1)
    expected = reference(a, grid.m if case.schedule == "perslice" else 1, grid if case.projection == "block" else None)
    layer = build(case, mesh)
    for name, parameter in layer.named_parameters():
        fill(parameter, expected.weights[name].to(case.dtype))
    mine, padding = own_tokens(case, mesh)
    x = shard(expected.x, mine, padding, float("nan")).to(case.dtype).requires_grad_()
    grad = shard(expected.grad, mine, padding, 1e6).to(case.dtype)  # of padding rows: must reach nothing
    with record() as forward:
        y = layer(x, (a.batch, a.length))
    with record() as backward:
        y.backward(grad)
    assert x.grad is not None
    # Of a gradient that is zero but for rounding (one token: its softmax is 1) the others' size is the measure.
    largest = max(gradient.abs().max().item() for gradient in expected.gradients.values())
    errors = {
        name: error(value[: len(mine)], whole[mine.start : mine.stop], whole, largest)
        for name, value, whole in (("y", y.detach(), expected.y), ("x", x.grad, expected.gradients["x"]))
    }
    for name, parameter in layer.named_parameters():
        errors[name] = parameter_error(name, parameter, expected.gradients[name], a.layout, mesh, largest)
    check_bytes(case, grid, mesh, forward)
    return Result(errors, dict(forward.bytes), dict(backward.bytes))


def build(case: Case, mesh: Mesh | None) -> HelixAttention:
    a = case.attention
    return HelixAttention(
        a.width,
        a.heads,
        a.kv_heads,
        a.head_dim,
        mesh=mesh,
        schedule=case.schedule,
        causal=a.causal,
        rope=a.rope,
        qk_norm=a.qk_norm,
        aggregate="project" if a.projects else "concat",
        concat=case.concat,
        projection=case.projection,
        stream=make_stream(case.stream, mesh.model) if mesh else None,
        dtype=case.dtype,
    )


def own_tokens(case: Case, mesh: Mesh | None) -> tuple[range, int]:
    """The tokens that this rank's part of the residual stream holds, and its number of padding rows."""
    tokens = case.attention.batch * case.attention.length
    if mesh is None or case.stream == "replicated":
        return range(tokens), 0
    size = -(-tokens // mesh.model.size)
    start = mesh.model.rank * size
    mine = range(min(start, tokens), min(start + size, tokens))
    return mine, size - len(mine)


def shard(whole: Tensor, mine: range, padding: int, filler: float) -> Tensor:
    rows = whole[mine.start : mine.stop]
    return torch.cat([rows, torch.full((padding, whole.shape[1]), filler, dtype=whole.dtype)])


def error(value: Tensor, expected: Tensor, whole: Tensor, largest: float = 0.0) -> float:
    """The largest deviation of this rank's part, relative to the largest value of the whole, or where that vanishes
    beside `largest`, to this.
    """
    assert value.shape == expected.shape
    if not value.numel():
        return 0.0
    deviation = (value.double() - expected).abs().max()
    size = whole.abs().max().item()
    return deviation.item() / (size if size > VANISHING * largest else largest) if deviation.isfinite() else math.inf


def parameter_error(
    name: str, parameter: Tensor, whole: Tensor, layout: HeadLayout, mesh: Mesh | None, largest: float
) -> float:
    """A gradient's error in the part that `Grid` says this rank owns, whatever its DTensor believes."""
    gradient = parameter.grad
    assert gradient is not None, f"{name} has no gradient"
    assert gradient.dtype == parameter.dtype
    if mesh is None:
        return error(gradient, whole, whole, largest)
    assert isinstance(gradient, DTensor)
    if name in NORMS:
        return error(gradient.full_tensor(), whole, whole, largest)
    features = mesh.grid.owned_features(layout, mesh.slice.rank)
    heads_dim = 1 if name == "wo" else 0  # wo[E, H, P, D/P], the others [H or K, P, D/P, E]
    heads = mesh.grid.owned_heads(whole.shape[heads_dim], mesh.head.rank)
    own = whole.flatten(heads_dim + 1, heads_dim + 2).narrow(heads_dim, heads.start, len(heads))
    own = own.index_select(heads_dim + 1, torch.tensor(features))
    return error(gradient.to_local().flatten(heads_dim + 1, heads_dim + 2), own, whole, largest)


def check_bytes(case: Case, grid: Grid, mesh: Mesh | None, log: Log) -> None:
    """What left this rank in the forward is what the closed forms say, collective by collective."""
    a, j, itemsize = case.attention, mesh.slice.rank if mesh else 0, case.dtype.itemsize
    schedule = build(case, mesh).schedule_for(a.batch, a.length) if case.schedule == "auto" else case.schedule
    cost = AttentionCost(a.layout, grid, schedule, a.batch, a.length, a.causal, itemsize)
    expected = dict(cost.bytes(j, a.qk_norm)) | _ends(case, grid, itemsize)
    assert dict(log.bytes) == expected, f"{case}: sent {dict(log.bytes)}, predicted {expected}"


def _ends(case: Case, grid: Grid, itemsize: int) -> dict[str, int]:
    """The bytes around the schedule: entering from the residual stream, and leaving into it."""
    a, p = case.attention, grid.ranks
    if p == 1:
        return {}
    tokens = a.batch * a.length
    size = -(-tokens // p) * a.width
    out: dict[str, int] = {}
    if case.stream == "sharded":
        out["all_gather/attention.enter"] = wire.all_gather(size, p, itemsize)
    if a.projects and case.stream == "sharded":
        out["reduce_scatter/attention.leave"] = wire.reduce_scatter(size * p, p, itemsize)
    elif a.projects:
        out["all_reduce/attention.leave"] = wire.all_reduce(tokens * a.width, p, itemsize)
    elif case.concat == "flat":
        out["all_gather/attention.concat"] = wire.all_gather(tokens * a.width // p, p, itemsize)
    else:
        share = tokens * a.width // p
        hierarchy = (("slices", share, grid.m), ("heads", share * grid.m, grid.n))
        out |= {
            f"all_gather/attention.concat_{axis}": wire.all_gather(numel, size, itemsize)
            for axis, numel, size in hierarchy
            if size > 1
        }
    return out


def run_all(grid: Grid, cases: list[Case]) -> list[Result]:
    """Every case on one mesh; runs on each rank."""
    mesh = Mesh(grid)
    return [check(case, mesh) for case in cases]


def worst(results: list[list[Result]], cases: list[Case]) -> list[tuple[float, str, Case]]:
    """For each case the largest error over ranks, and of what."""
    return [
        (*max((value, name) for rank in results for name, value in rank[index].errors.items()), case)
        for index, case in enumerate(cases)
    ]


def assert_parity(results: list[list[Result]], cases: list[Case]) -> None:
    """Every output and gradient on every rank within tolerance, and nothing lost on the way back."""
    failures = [
        f"{what} is off by {value:.1e} in {case}"
        for value, what, case in worst(results, cases)
        if not value <= TOLERANCE[case.dtype]
    ]
    assert not failures, "\n".join(failures[:10])


def with_dtype(cases: list[Case], dtype: torch.dtype) -> list[Case]:
    return [dataclasses.replace(case, dtype=dtype) for case in cases]
