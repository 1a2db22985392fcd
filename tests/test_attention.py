"""Every legal schedule on every grid against the oracle: output, every gradient, every byte."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from parity import (
    TOLERANCE,
    Attention,
    Case,
    Result,
    assert_parity,
    build,
    check,
    error,
    run_all,
    with_dtype,
)
from ranks import on_ranks
from torch import Tensor

from helix import Grid, HelixAttention, PartitionError
from helix.attention.oracle import attention_oracle
from helix.comm.mesh import Mesh
from helix.comm.parameters import whole as whole_of
from helix.comm.record import record
from helix.partition.cost import AttentionCost
from helix.partition.schedules import EXACT, SCHEDULES, refusal

# (grid, (heads, kv_heads, head_dim) of every attention that it can partition). m divides the heads and
# key/value heads of a group in some, so that `heads` runs, and not in others.
GRIDS: dict[str, tuple[Grid, list[tuple[int, int, int]]]] = {
    "1x1": (Grid(1, 1), [(4, 4, 8), (4, 2, 8), (4, 1, 8)]),
    "2x1": (Grid(2, 1), [(4, 4, 8), (4, 2, 8), (3, 3, 8), (4, 1, 8)]),
    "1x2": (Grid(1, 2), [(4, 4, 8), (4, 2, 8)]),
    "2x2": (Grid(2, 2), [(4, 4, 8), (2, 2, 8), (8, 4, 8), (4, 2, 8)]),
    "4x2": (Grid(4, 2), [(8, 8, 8), (4, 2, 8)]),
    "3x3": (Grid(3, 3), [(9, 3, 48), (9, 3, 96), (9, 9, 48)]),
    "4x4": (Grid(4, 4), [(16, 16, 8), (8, 4, 8)]),
    "8x2": (Grid(8, 2), [(2, 2, 16), (4, 2, 16)]),
}
CAUSAL_ROPE = list(itertools.product((True, False), (True, False)))


def core_cases(grid: Grid, shapes: list[tuple[int, int, int]]) -> list[Case]:
    """Every legal schedule x shape x causal x RoPE, with a batch and a length that m does not divide.

    On many ranks, where a case costs most, a shape has both values of each, and the next shape the other pairs.
    """
    many = (CAUSAL_ROPE[0::3], CAUSAL_ROPE[1:3])
    return [
        Case(Attention(*shape, causal=causal, rope=rope, batch=grid.m + 1, length=2 * grid.m + 1), schedule)
        for number, shape in enumerate(shapes)
        for causal, rope in (CAUSAL_ROPE if grid.ranks <= 4 else many[number % 2])
        for schedule in SCHEDULES
        if schedule != "heads" or all(count % grid.ranks == 0 for count in shape[:2])
    ]


def variants(grid: Grid, shape: tuple[int, int, int]) -> list[Case]:
    """QK-norm under every schedule, both ends, both projections, both residual streams.

    On many ranks, where a case costs most, one of the streams has RoPE and the other has not.
    """
    width = shape[0] * shape[2]
    base = Attention(*shape, rope=True, batch=grid.m + 1, length=2 * grid.m + 3, width=width)
    normed = dataclasses.replace(base, qk_norm=True)
    legal = [name for name in SCHEDULES if refusal(name, base.layout, grid, base.batch, base.length) is None]
    cases = [Case(normed, name) for name in legal]
    streams = itertools.product(("replicated", "sharded"), (True, False))
    for stream, rope in streams if grid.ranks <= 4 else (("replicated", False), ("sharded", True)):
        plain = dataclasses.replace(base, rope=rope)
        concat = dataclasses.replace(plain, projects=False)
        cases += [
            Case(dataclasses.replace(plain, qk_norm=True), "auto", stream=stream),
            Case(plain, "auto", stream=stream, projection="block"),
            Case(concat, "auto", stream=stream, concat="flat"),
            Case(concat, "auto", stream=stream, concat="hierarchical"),
        ]
    return [*cases, Case(concat, "perslice", projection="block", stream="sharded")]  # the papers' layer, literally


def grouped(results: list[list[Result]], grid: Grid) -> None:
    """Over an m-group, what the forward moved the backward moves back, however unevenly it was dealt."""
    for per_rank in zip(*results, strict=True):
        for i in range(grid.n):
            group = per_rank[i * grid.m : (i + 1) * grid.m]
            for kind in ("all_to_all", "all_reduce/attention.scores", "all_reduce/attention.qk_norm"):
                there, back = (
                    sum(value for one in group for key, value in getattr(one, way).items() if key.startswith(kind))
                    for way in ("forward", "backward")
                )
                assert there == back


@pytest.mark.parametrize("name", GRIDS)
def test_every_schedule_equals_the_oracle_in_output_gradients_and_bytes(name: str) -> None:
    grid, shapes = GRIDS[name]
    core = core_cases(grid, shapes)
    # One shape is enough to see that a dtype reaches all that a schedule computes and moves.
    first = [case for case in core if case.attention.layout == core[0].attention.layout and case.attention.causal]
    in_fp32 = with_dtype(first, torch.float32)
    cases = [*core, *in_fp32, *variants(grid, shapes[0])]
    results = on_ranks(grid.ranks, run_all, grid, cases)
    assert len(results) == grid.ranks
    assert_parity(results, cases)
    grouped(results, grid)


def test_the_cases_cover_what_they_should() -> None:
    """Each schedule runs on each grid with each kind of attention that the grid can hold."""
    seen = {
        (name, case.schedule, "MHA" if a.kv_heads == a.heads else "MQA" if a.kv_heads == 1 else "GQA")
        for name, (grid, shapes) in GRIDS.items()
        for case in core_cases(grid, shapes)
        for a in (case.attention,)
    }
    for name, (grid, _) in GRIDS.items():
        kinds = ("MHA", "GQA", "MQA") if grid.n == 1 else ("MHA", "GQA")  # one kv head fits no second group
        for schedule, kind in itertools.product(("perslice", "batch", "rows", "gather", "score"), kinds):
            assert (name, schedule, kind) in seen
    assert {name for name, schedule, _ in seen if schedule == "heads"} == {
        "1x1",
        "2x1",
        "1x2",
        "2x2",
        "4x2",
        "3x3",
        "4x4",
    }


def test_a_layer_without_a_mesh_is_the_oracle() -> None:
    """The single device: plain parameters, no collective, every schedule the same."""
    attentions = [
        Attention(4, kv_heads, 8, causal=causal, rope=rope, qk_norm=rope, width=32, projects=projects)
        for kv_heads, causal, rope, projects in itertools.product((4, 2, 1), *((True, False),) * 3)
    ]
    cases = [Case(attention, schedule) for attention in attentions for schedule in ("auto", *SCHEDULES)]
    cases += with_dtype(cases, torch.float32)
    results = on_ranks(1, lambda: [check(case, None) for case in cases])
    assert_parity(results, cases)


@pytest.mark.parametrize("name", ["2x1", "2x2", "3x3"])
def test_perslice_is_a_different_function(name: str) -> None:
    """It equals attention with h * m narrow heads, and is far from attention with h heads."""
    grid, shapes = GRIDS[name]
    for shape, (causal, rope) in itertools.product(shapes, CAUSAL_ROPE):
        attention = Attention(*shape, causal=causal, rope=rope, batch=4, length=16, projects=False)
        narrow, wide = reference_outputs(attention, grid.m)
        assert ((narrow - wide).norm() / wide.norm()).item() > 0.3


def reference_outputs(attention: Attention, slices: int) -> tuple[Tensor, Tensor]:
    """The narrow-heads and the whole-heads output, without any gradient."""
    a, generator = attention, torch.Generator().manual_seed(3)
    parts, run = a.layout.parts, a.head_dim // a.layout.parts
    wq, wk, wv = (
        torch.randn(heads, parts, run, a.width, generator=generator, dtype=torch.float64) * a.width**-0.5
        for heads in (a.heads, a.kv_heads, a.kv_heads)
    )
    x = torch.randn(a.batch, a.length, a.width, generator=generator, dtype=torch.float64)
    make = partial(attention_oracle, x, wq, wk, wv, causal=a.causal, rope=a.rope)
    return make(slices=slices), make()


def run_distance(attention: Attention, schedules: tuple[str, ...]) -> list[float]:
    """Distance of each schedule's output on a grid from the same weights' on a single device."""
    mesh, x = Mesh(Grid(4, 1)), torch.randn(4, 32, 24, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for schedule in schedules:
        layers = build(Case(attention, schedule), mesh), build(Case(attention, "auto"), None)
        with torch.no_grad():
            for layer in layers:
                layer.init_weights(0)
            y, single = (layer(x) for layer in layers)
        found.append(((y - single).norm() / single.norm()).item())
    return found


def test_only_perslice_is_far_from_the_attention_it_partitions() -> None:
    """As a user sees it: the same weights on a grid and on a single device."""
    for distances in on_ranks(4, run_distance, Attention(4, 4, 8), SCHEDULES):
        found = dict(zip(SCHEDULES, distances, strict=True))
        assert found.pop("perslice") > 0.3
        assert set(found) == set(EXACT)
        assert all(distance < TOLERANCE[torch.float64] for distance in found.values())


def run_init(grid: Grid) -> dict[str, Tensor | bool]:
    """Weights made on a mesh, whole, against the ones made without."""
    options = {"kv_heads": 2, "head_dim": 8, "rope": True, "qk_norm": True}
    sharded, single = (HelixAttention(16, 4, mesh=mesh, **options) for mesh in (Mesh(grid), None))
    sharded.init_weights(3)
    single.init_weights(3)
    wholes = dict(single.named_parameters())
    assert sum(p.to_local().numel() for n, p in sharded.named_parameters() if "norm" not in n) * grid.ranks == sum(
        p.numel() for n, p in wholes.items() if "norm" not in n
    )
    return {name: torch.equal(whole_of(p), wholes[name]) for name, p in sharded.named_parameters()}


@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(4, 1), Grid(1, 2)])
def test_weights_do_not_depend_on_the_grid(grid: Grid) -> None:
    for equal in on_ranks(grid.ranks, run_init, grid):
        assert equal == dict.fromkeys(("wq", "wk", "wv", "wo", "q_norm", "k_norm"), True)


def run_autocast(dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """What a layer with fp32 weights and QK-norm sends under autocast, and what one of `dtype` throughout would."""
    case = Case(Attention(4, 2, 8, rope=True, qk_norm=True, width=32), "batch")
    a, mesh = case.attention, Mesh(Grid(2, 1))
    layer = build(dataclasses.replace(case, dtype=torch.float32), mesh)
    layer.init_weights(0)
    with torch.autocast("cpu", dtype), record() as log, torch.no_grad():
        layer(torch.randn(a.batch, a.length, a.width))
    cost = AttentionCost(a.layout, mesh.grid, case.schedule, a.batch, a.length, a.causal, dtype.itemsize)
    predicted = dict(cost.bytes(mesh.slice.rank, qk_norm=True))
    return {key: log.bytes[key] for key in predicted}, predicted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_what_is_sent(dtype: torch.dtype) -> None:
    """The norms' weights stay fp32 under autocast, and would widen queries, keys and so values before they move."""
    for sent, predicted in on_ranks(2, run_autocast, dtype):
        assert sent == predicted


def run_refusals() -> None:
    mesh = Mesh(Grid(2, 1))
    x = torch.zeros(1, 4, 24)
    with pytest.raises(PartitionError, match="schedule=batch cannot run on helix_2x1: it deals samples to m=2 ranks"):
        HelixAttention(24, 3, mesh=mesh, schedule="batch")(x)
    with pytest.raises(PartitionError, match="does not divide the group's heads=3; legal: auto, perslice, rows"):
        HelixAttention(24, 3, mesh=mesh, schedule="heads")(x)
    with pytest.raises(PartitionError, match="it deals query rows to m=2 ranks, and the sequence has 1"):
        HelixAttention(24, 3, mesh=mesh, schedule="rows")(x[:, :1])
    with pytest.raises(PartitionError, match="m=2 does not divide head_dim=3"):
        HelixAttention(9, 3, mesh=mesh)
    for option, value in (("aggregate", "concat"), ("projection", "block")):
        with pytest.raises(
            PartitionError, match=rf"{option}={value} needs heads \* head_dim = width, not 3 \* 4 != 24"
        ):
            HelixAttention(24, 3, head_dim=4, mesh=mesh, **{option: value})


def test_what_a_layer_cannot_do_it_says() -> None:
    on_ranks(2, run_refusals)


def test_error_is_relative_to_the_whole_and_nan_is_never_small() -> None:
    """The comparison that everything above rests on can fail."""
    whole = torch.tensor([1.0, -4.0])
    assert error(torch.tensor([1.5]), whole[:1], whole) == pytest.approx(0.125)
    assert error(torch.tensor([1.0, float("nan")]), whole, whole) == float("inf")
    one = Case(Attention(1, 1, 2), "batch")
    for value in (2e-10, float("inf"), float("nan")):
        with pytest.raises(AssertionError, match="wq is off by"):
            assert_parity([[Result({"wq": value}, {}, {})]], [one])


def _as_made(grid: Grid) -> list[np.ndarray]:
    """Arrays: a tensor would be handed over as a file that ends with the rank."""
    torch.manual_seed(5)
    layer = HelixAttention(16, 4, mesh=Mesh(grid))
    return [whole_of(weight).numpy(force=True) for weight in layer.parameters()]


def test_a_new_layer_has_weights_that_torchs_seed_decides_and_no_grid() -> None:
    """Uninitialised memory would train to not-a-number."""
    torch.manual_seed(5)
    single = list(HelixAttention(16, 4).parameters())
    for grid in (Grid(2, 2), Grid(4, 1)):
        for found, expected in zip(on_ranks(4, _as_made, grid)[3], single, strict=True):
            assert np.array_equal(found, expected.numpy(force=True))
    assert not torch.equal(single[0], next(HelixAttention(16, 4).parameters()))
