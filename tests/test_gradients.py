"""Gradients after the hierarchical reduction: whole, equal on every rank that holds the parameter, and right;
their global norm, and clipping by it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fitting import each_on_ranks, whole
from ranks import on_ranks
from torch import nn

from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.models.transformer import Transformer
from helix.parallel import gradients
from helix.parallel.gradients import clip_gradients, global_norm, local_gradients, reduce_gradients
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

pytestmark = pytest.mark.usefixtures("deepspeed")
DENSE = TransformerShape(2, 32, heads=4, kv_heads=2, head_dim=8, mlp_hidden=48, vocab=50, qk_norm=True)
WIDE = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=50, vocab=50, qk_norm=True)
MOE = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=24, vocab=50, experts=4, top_k=2)
MOE_8 = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=24, vocab=50, experts=8, top_k=2)


@dataclass(frozen=True)
class Case:
    """A model on a grid. In fp64 sums in another order show as 1e-10; fp32 is what one trains in."""

    shape: TransformerShape
    grid: Grid
    data: int = 1
    residual: str = "sharded"
    ep_size: int = 1
    bucket: int = 2**25
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Found:
    """What one rank found; gradients are whole, by name."""

    whole: dict[str, torch.Tensor]
    norm: torch.Tensor
    norm_clipped: torch.Tensor
    partial: bool
    calls: dict[str, int]
    norm_calls: dict[str, int]


def _gradients(case: Case) -> Found:
    gradients.BUCKET_BYTES = case.bucket
    mesh, shape = Mesh(case.grid, data=case.data), case.shape
    options = AttentionOptions(residual=case.residual)
    model = Transformer(shape, mesh, options, ep_size=case.ep_size, dtype=case.dtype)
    model.init_weights(0)
    batch = torch.randint(shape.vocab, (4, 6), generator=torch.Generator().manual_seed(1))
    own = batch.chunk(case.data)[mesh.data.rank]
    weight = torch.linspace(-1, 1, shape.vocab, dtype=case.dtype)
    # This rank's part of the vocabulary; the loss is a mean over the replica's tokens.
    columns = weight[list(model.embedding.owned)]
    (model(own) * columns).square().sum().div(own.numel()).backward()
    with record() as log:
        reduce_gradients(model, mesh)
    partial = any(p.is_partial() for w in model.parameters() for p in w.grad.placements)
    reduced = whole(model, gradients=True)
    with record() as norm_log:
        norm = global_norm(model, mesh)
    before = {dtype: [shard.clone() for shard in shards] for dtype, shards in local_gradients(model).items()}
    assert torch.equal(clip_gradients(model, mesh, float(norm) / 3), norm)
    for dtype, shards in local_gradients(model).items():
        for shard, free in zip(shards, before[dtype], strict=True):
            torch.testing.assert_close(shard, free / 3, rtol=1e-5, atol=0)  # max_norm / (norm + 1e-6)
    return Found(reduced, norm, global_norm(model, mesh), partial, dict(log.calls), dict(norm_log.calls))


@pytest.fixture(scope="module")
def single() -> dict[TransformerShape, Found]:
    """The single device's, in fp64."""
    shapes = (DENSE, WIDE, MOE, MOE_8)
    found = [ranks[0] for ranks in each_on_ranks(1, _gradients, [(Case(shape, Grid(1, 1)),) for shape in shapes])]
    assert all(float(gradient.abs().max()) > 0 for each in found for gradient in each.whole.values())
    return dict(zip(shapes, found, strict=True))


def _found(ranks: int, cases: list[Case], single: dict[TransformerShape, Found]) -> list[Found]:
    """Rank 0's of each case; every rank's is the single device's."""
    results = each_on_ranks(ranks, _gradients, [(case,) for case in cases])
    for case, found in zip(cases, results, strict=True):
        _equal(found, single[case.shape], case)
    return [found[0] for found in results]


def _equal(results: list[Found], expected: Found, case: Case) -> None:
    # Sums in another order: a few units in the last place of a gradient's largest entry. Routers are fp32, and how
    # they round depends on how many tokens a rank has.
    tolerance = 1e-5 if case.dtype == torch.float32 else 1e-6 if case.shape.experts else 1e-10
    for found in results:
        assert not found.partial
        assert found.whole.keys() == expected.whole.keys()
        for name, gradient in expected.whole.items():
            atol = tolerance * float(gradient.abs().max())
            torch.testing.assert_close(found.whole[name].double(), gradient.double(), rtol=0, atol=atol)
        # Each parameter once: the norm of the gradients put together; and the single device's.
        together = torch.cat([gradient.double().flatten() for gradient in found.whole.values()]).norm()
        assert found.norm.dtype == case.dtype
        rounding = 1e-6 if case.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(found.norm.double(), together, rtol=rounding, atol=0)
        torch.testing.assert_close(found.norm.double(), expected.norm, rtol=tolerance, atol=0)
        torch.testing.assert_close(found.norm_clipped, found.norm / 3, rtol=1e-5, atol=0)
        assert torch.equal(found.norm, results[0].norm)


def test_every_gradient_and_the_norm_are_the_single_devices(single: dict[TransformerShape, Found]) -> None:
    """Slices come before head groups before data, in one collective each, or several for what a bucket cannot hold."""
    both, replicated, replicas, bucketed, *_ = _found(
        4,
        [
            Case(DENSE, Grid(2, 2)),
            Case(DENSE, Grid(2, 2), residual="replicated"),
            Case(DENSE, Grid(2, 1), data=2),
            Case(DENSE, Grid(2, 1), data=2, bucket=4096),
            Case(WIDE, Grid(1, 4)),  # an MLP and a vocabulary that the ranks cut unevenly
            Case(WIDE, Grid(4, 1)),
            Case(WIDE, Grid(1, 2), data=2, residual="replicated"),
            Case(DENSE, Grid(2, 2), dtype=torch.float32),
        ],
        single,
    )
    assert list(both.calls.items()) == [("all_reduce/gradient.slice", 1), ("all_reduce/gradient.head", 1)]
    assert both.norm_calls == {"all_reduce/gradient_norm.model": 1}
    # With a replicated stream the norms' gradients are whole already; only QK-norm's sum over the head groups.
    assert replicated.calls == {"all_reduce/gradient.head": 1}
    assert list(replicas.calls.items()) == [("all_reduce/gradient.slice", 1), ("all_reduce/gradient.data", 1)]
    assert bucketed.calls["all_reduce/gradient.data"] > 2


def test_experts_and_router_are_reduced_over_their_own_axes(single: dict[TransformerShape, Found]) -> None:
    both, _, _, replicas, _ = _found(
        4,
        [
            Case(MOE, Grid(2, 2), ep_size=2),  # 2 replicas of 2 ranks with 2 experts each
            Case(MOE, Grid(4, 1), residual="replicated", ep_size=4),
            Case(MOE, Grid(1, 4)),
            Case(MOE, Grid(2, 1), data=2, ep_size=2),
            Case(MOE, Grid(2, 2), ep_size=2, dtype=torch.float32),
        ],
        single,
    )
    assert both.calls["all_reduce/gradient.replica"] == 1
    assert "all_reduce/gradient.replica" not in replicas.calls


def test_sixteen_ranks_in_fp32(single: dict[TransformerShape, Found]) -> None:
    cases = [Case(WIDE, Grid(4, 4), dtype=torch.float32), Case(MOE_8, Grid(4, 4), ep_size=8, dtype=torch.float32)]
    _found(16, cases, single)


def _plain() -> tuple[torch.Tensor, torch.Tensor, float]:
    """An ordinary layer beside partitioned ones: the same on the two ranks of a replica, averaged over two."""
    mesh = Mesh(Grid(2, 1), data=2)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.grad = torch.full((1, 1), 3.0 + 2 * mesh.data.rank)
    reduce_gradients([layer.weight], mesh)
    once = layer.weight.grad.clone()
    reduce_gradients([layer.weight], mesh)
    return once, layer.weight.grad, float(global_norm(layer, mesh))


def test_a_plain_parameter_is_averaged_over_data_and_counted_once() -> None:
    for once, twice, norm in on_ranks(4, _plain):
        assert float(once) == float(twice) == norm == 4


def _unreduced() -> None:
    mesh = Mesh(Grid(2, 1))
    model = Transformer(DENSE, mesh, AttentionOptions())
    model.init_weights(0)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    with pytest.raises(ValueError, match="reduce_gradients first"):
        global_norm(model, mesh)
    reduce_gradients(model, mesh)
    with pytest.raises(ValueError, match="max_norm must be above 0, not nan"):
        clip_gradients(model, mesh, float("nan"))


def test_a_norm_of_unreduced_gradients_is_refused() -> None:
    on_ranks(2, _unreduced)
