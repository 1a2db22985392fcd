"""Models to save and load on ranks, and what of them has to come back: every whole tensor, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from helix.checkpoint.save_and_load import load, save
from helix.checkpoint.whole import state_tensors, wholes
from helix.comm.mesh import Mesh
from helix.models.transformer import Transformer
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

# 5 words on 4 ranks: one rank has none. 10 columns on 4 ranks: uneven.
DENSE = TransformerShape(2, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=10, vocab=5, qk_norm=True, rope=True)
MOE = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=6, vocab=16, experts=4)
LARGE = TransformerShape(2, 64, heads=8, kv_heads=8, head_dim=8, mlp_hidden=40, vocab=50, experts=8, rope=True)


def build(
    shape: TransformerShape, grid: Grid, data: int = 1, ep_size: int | None = None, seed: int = 0
) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(shape, Mesh(grid, data), AttentionOptions(), ep_size)
    model.init_weights(seed)
    return model, make_optimizer(model)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    norms = [w for name, w in model.named_parameters() if "norm" in name]
    others = [w for name, w in model.named_parameters() if "norm" not in name]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step whose gradients depend on the weights alone, so that they are right on every grid."""
    for weight in model.parameters():
        weight.grad = (weight.detach() * 3 + 0.5).clone()
    optimizer.step()


def digests_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, str]:
    """Of every whole tensor's bytes, as this rank has them."""
    found = wholes(model)
    tensors = {name: each.gather(each.parts) for name, each in found.items()}
    if optimizer is not None:
        tensors |= state_tensors(found, optimizer)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {
        name: hashlib.sha256(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in whole.items()
    }


def trained(folder: Path, shape: TransformerShape, grid: Grid, data: int = 1, steps: int = 2) -> dict[str, str]:
    model, optimizer = build(shape, grid, data)
    for step in range(1, steps + 1):
        step_once(model, optimizer)
        save(folder, model, [optimizer], {"step": step}, keep=2, step=step)
    return digests_of(model, optimizer)


def loaded(
    folder: Path, shape: TransformerShape, grid: Grid, data: int = 1, ep_size: int | None = None
) -> tuple[dict[str, str], dict[str, object], float]:
    model, optimizer = build(shape, grid, data, ep_size, seed=1)
    optimizer.param_groups[1]["lr"] = 7.0  # the checkpoint's is 0.01
    extra = load(folder, model, [optimizer])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    return digests_of(model, optimizer), extra, optimizer.param_groups[1]["lr"]
