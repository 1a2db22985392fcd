"""Gradients after the hierarchical reduction: whole, equal on every rank that holds the parameter, and right;
their global norm, and clipping by it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fitting import whole
from ranks import on_ranks
from torch import nn

from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.models.transformer import Transformer
from helix.parallel import gradients
from helix.parallel.gradients import clip_gradients, global_norm, reduce_gradients
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

DENSE = TransformerShape(2, 32, heads=4, kv_heads=2, head_dim=8, mlp_hidden=48, vocab=50, qk_norm=True)
WIDE = TransformerShape(2, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=50, vocab=50, qk_norm=True)
MOE = TransformerShape(2, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=24, vocab=50, experts=4, top_k=2)
MOE_8 = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=24, vocab=50, experts=8, top_k=2)


@dataclass(frozen=True)
class Found:
    """What one rank found; gradients are whole, by name."""

    whole: dict[str, torch.Tensor]
    norm: torch.Tensor
    clipped: dict[str, torch.Tensor]
    norm_clipped: torch.Tensor
    partial: bool
    calls: dict[str, int]
    norm_calls: dict[str, int]


def _gradients(
    grid: Grid, data: int, shape: TransformerShape, residual: str = "sharded", ep_size: int = 1, bucket: int = 2**25
) -> Found:
    gradients.BUCKET_BYTES = bucket
    mesh = Mesh(grid, data=data)
    model = Transformer(shape, mesh, AttentionOptions(residual=residual), ep_size=ep_size, dtype=torch.float64)
    model.init_weights(0)
    batch = torch.randint(shape.vocab, (4, 6), generator=torch.Generator().manual_seed(1))
    own = batch.chunk(data)[mesh.data.rank]
    weight = torch.linspace(-1, 1, shape.vocab, dtype=torch.float64)
    # This rank's part of the vocabulary; the loss is a mean over the replica's tokens.
    columns = weight[list(model.embedding.owned)]
    (model(own) * columns).square().sum().div(own.numel()).backward()
    with record() as log:
        reduce_gradients(model, mesh)
    partial = any(p.is_partial() for w in model.parameters() for p in w.grad.placements)
    reduced = whole(model, gradients=True)
    with record() as norm_log:
        norm = global_norm(model, mesh)
    assert torch.equal(clip_gradients(model, mesh, float(norm) / 3), norm)
    return Found(
        reduced,
        norm,
        whole(model, gradients=True),
        global_norm(model, mesh),
        partial,
        dict(log.calls),
        dict(norm_log.calls),
    )


def _single(shape: TransformerShape) -> Found:
    found = on_ranks(1, _gradients, Grid(1, 1), 1, shape)[0]
    assert all(float(gradient.abs().max()) > 0 for gradient in found.whole.values())
    return found


def _norm(whole: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.double().flatten() for gradient in whole.values()]).norm()


def _equal(results: list[Found], expected: Found) -> None:
    moe = any("experts" in name for name in expected.whole)
    for found in results:
        assert not found.partial
        assert found.whole.keys() == expected.whole.keys()
        for name, gradient in expected.whole.items():
            # Sums in another order: a few units in the last place of the largest entry. Routers are fp32, and how
            # they round depends on how many tokens a rank has.
            atol = (1e-6 if moe else 1e-10) * float(gradient.abs().max())
            torch.testing.assert_close(found.whole[name], gradient, rtol=0, atol=atol)
            torch.testing.assert_close(found.clipped[name], expected.clipped[name], rtol=0, atol=atol)
        # Each parameter once: the norm of the gradients put together; and the single device's.
        assert found.norm.dtype == torch.float64
        torch.testing.assert_close(found.norm, _norm(found.whole), rtol=1e-10, atol=0)
        torch.testing.assert_close(found.norm, expected.norm, rtol=1e-6 if moe else 1e-10, atol=0)
        # The ratio is max_norm / (norm + 1e-6), and an fp32 router's share of it is rounded.
        torch.testing.assert_close(found.norm_clipped, found.norm / 3, rtol=1e-5, atol=0)
        assert torch.equal(found.norm, results[0].norm)


def test_every_gradient_and_the_norm_are_the_single_devices() -> None:
    expected = _single(DENSE)
    _equal(on_ranks(4, _gradients, Grid(2, 2), 1, DENSE), expected)
    _equal(on_ranks(4, _gradients, Grid(2, 2), 1, DENSE, "replicated"), expected)
    _equal(on_ranks(4, _gradients, Grid(4, 1), 1, DENSE), expected)
    _equal(on_ranks(4, _gradients, Grid(2, 1), 2, DENSE), expected)


def test_more_ranks_than_shards_along_one_axis() -> None:
    """1 x 4, and an MLP and a vocabulary that the ranks cut unevenly."""
    expected = _single(WIDE)
    _equal(on_ranks(4, _gradients, Grid(1, 4), 1, WIDE), expected)
    _equal(on_ranks(4, _gradients, Grid(1, 2), 2, WIDE, "replicated"), expected)


def test_experts_and_router_are_reduced_over_their_own_axes() -> None:
    expected = _single(MOE)
    results = on_ranks(4, _gradients, Grid(2, 2), 1, MOE, "sharded", 2)  # 2 replicas of 2 ranks with 2 experts each
    _equal(results, expected)
    assert results[0].calls["all_reduce/gradient.replica"] == 1
    _equal(on_ranks(4, _gradients, Grid(4, 1), 1, MOE, "replicated", 4), expected)
    _equal(on_ranks(4, _gradients, Grid(1, 4), 1, MOE, "sharded", 1), expected)
    results = on_ranks(4, _gradients, Grid(2, 1), 2, MOE, "sharded", 2)
    _equal(results, expected)
    assert "all_reduce/gradient.replica" not in results[0].calls


@pytest.mark.slow
def test_sixteen_ranks() -> None:
    _equal(on_ranks(16, _gradients, Grid(4, 4), 1, WIDE, timeout_s=60), _single(WIDE))
    _equal(on_ranks(16, _gradients, Grid(4, 4), 1, MOE_8, "sharded", 8, timeout_s=60), _single(MOE_8))


def test_slices_come_before_head_groups_before_data_in_one_collective_each() -> None:
    calls = on_ranks(4, _gradients, Grid(2, 1), 2, DENSE)[0].calls
    assert list(calls.items()) == [("all_reduce/gradient.slice", 1), ("all_reduce/gradient.data", 1)]
    found = on_ranks(4, _gradients, Grid(2, 2), 1, DENSE)[0]
    assert list(found.calls.items()) == [("all_reduce/gradient.slice", 1), ("all_reduce/gradient.head", 1)]
    assert found.norm_calls == {"all_reduce/gradient_norm.model": 1}
    # With a replicated stream the norms' gradients are whole already; only QK-norm's sum over the head groups.
    assert on_ranks(4, _gradients, Grid(2, 2), 1, DENSE, "replicated")[0].calls == {"all_reduce/gradient.head": 1}


def test_what_is_too_large_for_one_bucket_travels_in_several() -> None:
    expected = _single(DENSE)
    results = on_ranks(4, _gradients, Grid(2, 1), 2, DENSE, "sharded", 1, 4096)
    _equal(results, expected)
    assert results[0].calls["all_reduce/gradient.data"] > 2


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
