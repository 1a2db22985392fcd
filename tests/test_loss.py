"""Losses over a cut vocabulary and over routed tokens: those of the whole, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.models.loss import LoadBalance, cross_entropy
from helix.models.transformer import Transformer
from helix.parallel.gradients import reduce_gradients
from helix.partition.grid import Grid, shard_range
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

CASES_PER_LAUNCH = 20
Case = tuple[int, int, float]  # tokens, words, size of the logits


def _draw(tokens: int, vocab: int, size: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1009 + vocab)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64).mul(size).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return logits, targets, torch.rand(tokens, generator=generator, dtype=torch.float64)


def _errors(cases: list[Case], dtype: torch.dtype) -> list[tuple[float, float, int]]:
    """For each case how far the losses and their gradient are from F.cross_entropy's, and the bytes moved."""
    grid = Grid(1, torch.distributed.get_world_size())
    axis = Mesh(grid).model
    found = []
    for tokens, vocab, size in cases:
        logits, targets, weight = _draw(tokens, vocab, size, dtype)
        whole = logits.double().clone().requires_grad_()
        expected = F.cross_entropy(whole, targets, reduction="none")
        (expected * weight).sum().backward()
        assert whole.grad is not None
        owned = shard_range(vocab, axis.size, axis.rank)
        own = logits[:, owned.start : owned.stop].clone().requires_grad_()
        with record() as log:
            losses = cross_entropy(own, targets, vocab, axis)
            (losses * weight.to(losses)).sum().backward()
        assert own.grad is not None
        assert own.grad.dtype == dtype
        gradient = (own.grad.double() - whole.grad[:, owned.start : owned.stop]).abs()
        worst = float(gradient.max()) if gradient.numel() else 0.0
        found.append(
            (float((losses.detach().double() - expected.detach()).abs().max()), worst, sum(log.bytes.values()))
        )
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@settings(
    max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None,
    phases=[Phase.generate],  # each example is a launch: to shrink one takes minutes
)  # fmt: skip
@given(
    cases=st.lists(
        # Fewer words than ranks leave some ranks without any; logits of 100 overflow an exponential in fp32.
        st.tuples(st.integers(1, 20), st.integers(1, 40), st.sampled_from((0.1, 1.0, 100.0))),
        min_size=CASES_PER_LAUNCH,
        max_size=CASES_PER_LAUNCH,
    )
)
def test_the_loss_is_that_of_the_whole_vocabulary(ranks: int, cases: list[Case]) -> None:
    for found in on_ranks(ranks, _errors, cases, torch.float64):
        for (tokens, _, size), (loss, gradient, nbytes) in zip(cases, found, strict=True):
            # A few roundings of the largest logit.
            assert loss <= 1e-14 * (10 + 10 * size)
            assert gradient <= 1e-13
            assert nbytes == 2 * tokens * (ranks - 1) * 8  # one gather, and nothing in the backward


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_narrow_logits_are_summed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    for found in on_ranks(2, _errors, [(7, 33, 5.0)], dtype):
        loss, gradient, _ = found[0]
        assert loss <= 40 * tolerance  # of losses up to about 20
        # The gradient has the logits' type: half a unit in the last place of at most 1.
        assert gradient <= max(tolerance, torch.finfo(dtype).eps / 2)


MOE = TransformerShape(2, 16, heads=4, kv_heads=4, head_dim=4, mlp_hidden=8, vocab=20, experts=4, top_k=2)


def _balance(grid: Grid, data: int, residual: str) -> tuple[float, dict[str, torch.Tensor], float]:
    mesh = Mesh(grid, data=data)
    model = Transformer(MOE, mesh, AttentionOptions(residual=residual), ep_size=1, dtype=torch.float64)
    model.init_weights(0)
    balance = LoadBalance(model, MOE, mesh)
    # 2 x 15 tokens a replica, or 30: no number of ranks beyond 2 divides them.
    batch = torch.randint(MOE.vocab, (4, 15), generator=torch.Generator().manual_seed(1)).chunk(data)[mesh.data.rank]
    model(batch)
    loss = balance.loss(batch.numel())
    loss.backward()
    for parameter in model.parameters():  # what follows the last router has no gradient
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    reduce_gradients(model, mesh)
    total = loss.detach().clone()
    for axis in (mesh.model, mesh.data):
        if axis.size > 1:
            torch.distributed.all_reduce(total, group=axis.group)
    deepspeed = torch.stack([block.mlp.auxiliary_loss.detach() for block in model.blocks]).mean()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    return float(total) / data, gradients, float(deepspeed)


@pytest.mark.parametrize("residual", ["sharded", "replicated"])
@pytest.mark.parametrize(("grid", "data"), [(Grid(2, 2), 1), (Grid(1, 2), 2)])
def test_load_balance_is_the_same_function_on_every_grid(grid: Grid, data: int, residual: str) -> None:
    expected, gradients, deepspeed = on_ranks(1, _balance, Grid(1, 1), 1, "sharded")[0]
    assert math.isclose(expected, deepspeed, rel_tol=1e-6)  # GShard's, of all tokens
    assert any(float(gradient.abs().max()) > 1e-4 for name, gradient in gradients.items() if "wg" in name)
    results = on_ranks(4, _balance, grid, data, residual)
    # The mean over ranks of each rank's own, which is another function, is not asked for.
    assert any(abs(own - expected) > 1e-3 for _, _, own in results)
    for loss, found, _ in results:
        assert math.isclose(loss, expected, rel_tol=1e-6)  # routers compute in fp32
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
