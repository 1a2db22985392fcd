"""Models to save and load on ranks, all of whose values follow from a seed, on every grid, without any collective."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from helix.checkpoint.save_and_load import load, save
from helix.checkpoint.whole import state_tensors, wholes
from helix.comm.mesh import Mesh
from helix.models.transformer import Transformer
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

# On 16 ranks: 13 words (three have none) and 20 columns (uneven).
DENSE = TransformerShape(1, 64, heads=8, kv_heads=8, head_dim=8, mlp_hidden=20, vocab=13, qk_norm=True, rope=True)
MOE = TransformerShape(1, 32, heads=8, kv_heads=8, head_dim=8, mlp_hidden=6, vocab=16, experts=8)
LR = 0.01


def build(
    shape: TransformerShape, grid: Grid, data: int = 1, ep_size: int | None = None, seed: int = 0
) -> tuple[Transformer, torch.optim.AdamW]:
    """A model, and AdamW as if it had made steps: its moments are functions of the weights, element by element."""
    model = Transformer(shape, Mesh(grid, data), AttentionOptions(), ep_size)
    model.init_weights(seed)
    return model, optimizer_of(model)


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    norms = [w for name, w in model.named_parameters() if "norm" in name]
    others = [w for name, w in model.named_parameters() if "norm" not in name]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), foreach=False)
    for weight in model.parameters():
        own = weight.detach()
        optimizer.state[weight] = {"step": torch.tensor(7.0), "exp_avg": own * 3, "exp_avg_sq": own * own}
    return optimizer


def change(model: nn.Module) -> None:
    """Other weights, as after a step."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)


def forget(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """So that what a checkpoint does not bring back is missed."""
    change(model)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = 7.0


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Copies of what this rank holds: its parts of the weights, and of their optimizer's state."""
    found = {}
    for name, weight in model.named_parameters():
        found[name] = weight
        for key, value in (optimizer.state[weight] if optimizer is not None else {}).items():
            found[f"{key}/{name}"] = value
    return {name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for name, t in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def saved(folder: Path, shape: TransformerShape, grid: Grid, *steps: int) -> None:
    """A checkpoint for each of `steps`, all alike but for their number."""
    model, optimizer = build(shape, grid)
    for step in steps:
        save(folder, model, [optimizer], {"step": step}, keep=2, step=step)


def check_loads(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Check that everything comes back, bit for bit, to a model as `build` made it; returns the extra."""
    expected = held(model, optimizer)
    forget(model, optimizer)
    extra = load(folder, model, [optimizer])
    assert_same(held(model, optimizer), expected)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    return extra


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step whose gradients depend on the weights alone, so that they are right on every grid."""
    for weight in model.parameters():
        weight.grad = (weight.detach() * 3 + 0.5).clone()
    optimizer.step()


def digests_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, str]:
    """Of every whole tensor's bytes, by collectives."""
    found = wholes(model)
    tensors = {name: each.gather(each.parts) for name, each in found.items()}
    if optimizer is not None:
        tensors |= state_tensors(found, optimizer)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {
        name: hashlib.sha256(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in whole.items()
    }
