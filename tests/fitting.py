"""A LightningModule as a user would write it, and one call that fits it on this rank, for the tests of training."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from helix.comm import collectives
from helix.models.transformer import Transformer
from helix.parallel.strategy import HelixStrategy
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

T = TypeVar("T")
DENSE = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=64, vocab=64, qk_norm=True)
MOE = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=24, vocab=64, experts=4)


def tokens(samples: int) -> Tensor:
    """tokens[samples, 9], the same everywhere."""
    return torch.randint(64, (samples, 9), generator=torch.Generator().manual_seed(3))


class Lit(LightningModule):
    """Next-token prediction: it partitions in configure_model, and knows of the partition nothing else."""

    def __init__(self, shape: TransformerShape, ep_size: int | None = None) -> None:
        super().__init__()
        self.shape, self.ep_size = shape, ep_size

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = Transformer(self.shape, self.trainer.strategy.mesh, AttentionOptions(), self.ep_size)
        self.model.init_weights(0)

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch[:, :-1])
        whole = collectives.gather(logits.t().contiguous(), self.model.mesh.model, "logits").t()
        return F.cross_entropy(whole.float() if whole.dtype != torch.float64 else whole, batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, batch_size=len(batch))
        self.log("summed", loss, sync_dist=True, reduce_fx="sum", batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True, batch_size=len(batch))

    def test_step(self, batch: Tensor, index: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


@dataclass
class Seen:
    """What a fit came by: of each step the norm, the scale, and what `Watch` was asked to gather whole.

    Attributes:
        gradients: as `on_before_optimizer_step` sees them; `clipped` as the step did.
        parameters: after the step.
        losses: of each micro-batch.
    """

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    clipped: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


class Watch(Callback):
    """Keeps what is seen; of the whole tensors, each of which is a collective, only the `kept` fields of `Seen`."""

    def __init__(self, kept: Sequence[str] = ()) -> None:
        self.seen, self.kept = Seen(), kept
        self._stepped = False

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self._stepped = True
        if "gradients" in self.kept:
            self.seen.gradients.append(whole(module, gradients=True))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        seen = self.seen
        seen.losses.append(float(trainer.callback_metrics["loss"]))
        if not self._stepped:
            return  # a micro-batch without a step
        self._stepped = False
        if "clipped" in self.kept:
            seen.clipped.append(whole(module, gradients=True))
        if "parameters" in self.kept:
            seen.parameters.append(whole(module))
        plugin: Any = trainer.precision_plugin
        seen.norms.append(None if plugin.gradient_norm is None else float(plugin.gradient_norm))
        if plugin.scaler is not None:
            seen.scales.append(plugin.scaler.value)


def whole(module: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter, or every gradient, whole; experts by their number in the model, which no rank's name says."""
    out: dict[str, Tensor] = {}
    names = [name for name, _ in module.named_parameters()]
    for name, parameter in module.named_parameters():
        tensor = parameter.grad if gradients else parameter.detach()
        assert tensor is not None, name
        tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        if expert := re.search(r"deepspeed_experts\.(\d+)", name):
            each = sum(name[: expert.start()] in other and other.endswith(name[expert.end() :]) for other in names)
            for rank, own in enumerate(tensor):
                out[f"{name[: expert.start()]}{rank * each + int(expert[1])}{name[expert.end() :]}"] = own
        else:
            out[name] = tensor
    return out


def make_trainer(strategy: HelixStrategy, ranks: int, *callbacks: Callback, **kwargs: Any) -> Trainer:
    """A quiet Trainer on the ranks that are running."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        callbacks=list(callbacks),
        **dict.fromkeys(quiet, False),
        **kwargs,
    )


def fit(
    module: LightningModule, strategy: HelixStrategy, samples: int, batch: int, kept: Sequence[str] = (), **kwargs: Any
) -> Seen:
    """One epoch over `samples` samples; `batch` is the batch size of one replica, `kept` what `Watch` keeps."""
    watch = Watch(kept)
    trainer = make_trainer(strategy, strategy.grid.ranks * strategy.data, watch, max_epochs=1, **kwargs)
    trainer.fit(module, DataLoader(list(tokens(samples)), batch_size=batch))
    return watch.seen


def each_on_ranks(ranks: int, fn: Callable[..., T], cases: Sequence[tuple[Any, ...]]) -> list[list[T]]:
    """`fn(*case)` of each case, one after the other in one launch: of each case each rank's result.

    What a rank does for the first time, such as Lightning's first fit, takes longer than most cases.
    """
    by_rank = on_ranks(ranks, lambda: [fn(*case) for case in cases])
    return [list(results) for results in zip(*by_rank, strict=True)]
