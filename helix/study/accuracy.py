"""One step held against the single-device reference, and its counted bytes against the closed forms."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helix.comm.record import record
from helix.models.reference import Reference
from helix.models.transformer import Transformer
from helix.partition.transformer_cost import TransformerCost, expert_capacity
from helix.study.measure import BenchmarkModule


@dataclass(frozen=True)
class Check:
    """One rank's comparison.

    Args:
        executed, predicted: bytes that this rank sent in one step, by "collective/name".
        predicted_weight_bytes: closed form of this rank's weights.
        reference, relative_error, relative_error_to_h_heads: see `helix.study.report.Accuracy`.
    """

    executed: dict[str, int]
    predicted: dict[str, int]
    predicted_weight_bytes: int
    reference: str
    relative_error: float
    relative_error_to_h_heads: float | None


@torch.inference_mode()
def compare(module: BenchmarkModule, batch: Tensor, data: int) -> Check:
    """Run one more step, on the whole `batch`[B, T] of all replicas, and hold it against the reference.

    Every rank calls it; rank 0 computes the reference, in fp32 or the model's wider dtype, and the others wait.
    """
    model = module.model
    assert model is not None
    tokens = batch.chunk(data)[model.mesh.data.rank]
    with record() as log:
        logits = model(tokens.to(module.device))
    logits = model.whole_logits(logits).cpu()
    answer = [_answer(model, batch, logits, module.seed) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    assert answer[0] is not None
    error, h_heads, routes = answer[0]
    own_routes = [layer.chunk(data)[model.mesh.data.rank] for layer in routes]
    cost = TransformerCost(
        model.shape,
        model.mesh.grid,
        model.options,
        tokens.shape[0],
        tokens.shape[1],
        logits.element_size(),
        model.ep_size,
    )
    rank = model.mesh.model.rank
    return Check(
        executed=dict(log.bytes),
        predicted=dict(cost.bytes(rank, [_capacity(cost, layer, rank) for layer in own_routes])),
        predicted_weight_bytes=cost.weight_bytes(rank),
        reference="mha_narrow_heads" if model.options.schedule == "perslice" else "mha_fp32_single",
        relative_error=error,
        relative_error_to_h_heads=h_heads,
    )


def _answer(model: Transformer, batch: Tensor, logits: Tensor, seed: int) -> tuple[float, float | None, list[Tensor]]:
    """Relative error of replica 0's logits, for `perslice` also to the h-head model, and the reference's routes."""
    torch.set_num_threads(os.cpu_count() or 1)  # the other ranks are waiting
    narrow = model.options.schedule == "perslice"
    expected, routes = _reference(model, batch, seed, narrow)
    error = relative_error(logits, expected[: len(logits)])
    if not narrow:
        return error, None, routes
    return error, relative_error(logits, _reference(model, batch, seed, narrow=False)[0][: len(logits)]), routes


def _reference(model: Transformer, batch: Tensor, seed: int, narrow: bool) -> tuple[Tensor, list[Tensor]]:
    dtype = torch.promote_types(model.head.weight.dtype, torch.float32)
    reference = Reference(model.shape, model.mesh.grid, model.options, narrow, dtype)
    reference.init_weights(seed)
    return reference(batch), reference.routes


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected, in fp64."""
    difference = value.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def _capacity(cost: TransformerCost, routes: Tensor, rank: int) -> int:
    """Rows of the fullest expert in this rank's expert group, had the reference's tokens been dealt to the ranks."""
    groups = expert_capacity(routes.tolist(), cost.shape.experts, cost.grid.ranks, cost.ep_size, cost.tokens_per_shard)
    return groups[rank // cost.ep_size]
