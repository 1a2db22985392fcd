"""Gradients after the hierarchical reduction: whole, equal on every rank that holds the parameter, and right."""

from __future__ import annotations

import torch
from ranks import on_ranks
from torch.distributed.tensor import DTensor

from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.models.transformer import Transformer
from helix.parallel.gradients import reduce_gradients
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

DENSE = TransformerShape(2, 32, heads=4, kv_heads=2, head_dim=8, mlp_hidden=48, vocab=50, qk_norm=True)
MOE = TransformerShape(2, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=24, vocab=50, experts=2)


def _gradients(
    grid: Grid, data: int, shape: TransformerShape, residual: str
) -> tuple[dict[str, torch.Tensor], set[str], bool]:
    mesh = Mesh(grid, data=data)
    model = Transformer(shape, mesh, AttentionOptions(residual=residual), ep_size=1, dtype=torch.float64)
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
    whole = {name: w.grad.full_tensor() for name, w in model.named_parameters() if isinstance(w.grad, DTensor)}
    assert len(whole) == len(list(model.parameters()))
    return whole, set(log.bytes), partial


def _equal(results: list, expected: dict[str, torch.Tensor]) -> None:
    for whole, _, partial in results:
        assert not partial
        for name, gradient in expected.items():
            # Sums in another order: a few units in the last place of the largest entry. The router is fp32.
            tolerance = 1e-10 if gradient.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(whole[name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max()))


def test_every_gradient_is_whole_on_every_rank() -> None:
    expected = on_ranks(1, _gradients, Grid(1, 1), 1, DENSE, "sharded")[0][0]
    assert all(float(gradient.abs().max()) > 0 for gradient in expected.values())
    _equal(on_ranks(4, _gradients, Grid(2, 2), 1, DENSE, "sharded"), expected)
    _equal(on_ranks(4, _gradients, Grid(2, 2), 1, DENSE, "replicated"), expected)
    _equal(on_ranks(4, _gradients, Grid(2, 1), 2, DENSE, "sharded"), expected)


def test_experts_and_router_are_reduced_over_their_own_axes() -> None:
    expected = on_ranks(1, _gradients, Grid(1, 1), 1, MOE, "sharded")[0][0]
    results = on_ranks(4, _gradients, Grid(2, 2), 1, MOE, "sharded")
    _equal(results, expected)
    assert any("replica" in key for key in results[0][1])


def test_the_order_is_slices_then_head_groups_then_data() -> None:
    keys = [key.split("/")[1] for key in on_ranks(4, _gradients, Grid(2, 1), 2, DENSE, "sharded")[0][1]]
    assert set(keys) == {"gradient.slice", "gradient.data"}
    keys = [key.split("/")[1] for key in on_ranks(4, _gradients, Grid(2, 2), 1, DENSE, "replicated")[0][1]]
    # With a replicated stream the norms' gradients are whole already; only QK-norm's sum over the head groups.
    assert set(keys) == {"gradient.head"}
