"""The language model that `train.py` trains, as a LightningModule, and its batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from helix.comm import transport
from helix.comm.mesh import Mesh
from helix.config.schema import expert_parallel, to_shape
from helix.config.train_schema import OptimizerConfig, TrainConfig
from helix.models.loss import LoadBalance, cross_entropy
from helix.models.transformer import Transformer
from helix.parallel.strategy import HelixStrategy
from helix.partition.options import AttentionOptions
from helix.study.text import TrainingText

# Of weights; with mixed precision they are kept in fp32.
DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
NATS_PER_BIT = math.log(2)


class LanguageModel(LightningModule):
    """A transformer over the strategy's mesh that learns to predict the next byte.

    Args:
        settings: of the whole training.
        options: how attention is laid over the grid, its schedule resolved.

    Attributes:
        data_position: training batches seen so far, which is the number of the next one.
        losses: of each batch since they were last taken, in nats a token, over this replica's tokens.
        validation_bpb: of the last validation, in bits per byte.
    """

    def __init__(self, settings: TrainConfig, options: AttentionOptions) -> None:
        super().__init__()
        self.settings, self.options = settings, options
        self.data_position = 0
        self.losses: list[Tensor] = []
        self.validation_bpb = float("nan")
        self._sums: list[Tensor] = []

    @property
    def mesh(self) -> Mesh:
        strategy = self.trainer.strategy
        assert isinstance(strategy, HelixStrategy)
        return strategy.mesh

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        settings = self.settings
        ep_size, dtype = expert_parallel(settings.model, settings.parallel), DTYPES.get(settings.precision)
        self.model = Transformer(to_shape(settings.model), self.mesh, self.options, ep_size, dtype or torch.float32)
        self.model.init_weights(settings.seed)
        balanced = settings.model.experts > 0 and settings.auxiliary_weight > 0
        self.balance = LoadBalance(self.model, self.mesh) if balanced else None

    def forward(self, batch: Tensor) -> Tensor:
        """batch[B, T + 1] -> the loss of each token [B * T], in nats."""
        logits = self.model(batch[:, :-1])
        return cross_entropy(logits, batch[:, 1:].flatten(), self.model.shape.vocab, self.mesh.model)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        losses = self(batch)
        loss = losses.mean()
        self.losses.append(loss.detach())
        self.data_position += 1  # here, since callbacks that save it come before this module's own hooks
        if self.balance is not None:
            loss = loss + self.settings.auxiliary_weight * self.balance.loss(losses.numel())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self.trainer.global_step >= self.settings.trainer.max_steps:
            self.trainer.should_stop = True  # has Lightning validate once more, wherever the steps end

    def validation_step(self, batch: Tensor, index: int) -> None:
        losses = self(batch)
        self._sums.append(torch.stack([losses.sum(), losses.new_tensor(losses.numel())]))

    def on_validation_epoch_end(self) -> None:
        total = torch.stack(self._sums).sum(0)
        self._sums.clear()
        if self.mesh.data.size > 1:
            total = transport.all_reduce(total, self.mesh.data, "validation")
        self.validation_bpb = float(total[0] / total[1]) / NATS_PER_BIT

    def configure_optimizers(self) -> Any:
        config = self.settings.optimizer
        optimizer = make_optimizer(self, config)
        steps = self.settings.trainer.max_steps
        schedule = LambdaLR(optimizer, lambda step: lr_factor(step, steps, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of the step that follows `step` others, over `config.lr`.

    1 / warmup_steps in the first step, 1 in the last one of the warm-up; then by half a cosine, whose end is where
    training ends, down to `final_lr_ratio`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "none":
        return 1.0
    left = max(1, max_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / left)
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(module: torch.nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer by its config name. Weights are decayed; norms, and whatever else scales features, are not."""
    groups: dict[tuple[DeviceMesh | None, bool], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        decays = not name.endswith("_norm") and parameter.ndim > 1
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((mesh, decays), []).append(parameter)
    # `foreach` dispatches once for all of a group's DTensors, which have to be on one mesh, and not once for each:
    # 3.5 ms a step instead of 11 on one CPU core, for a model of two layers.
    listed = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
        for (_, decays), parameters in groups.items()
    ]
    if config.name == "sgd":
        return SGD(listed, lr=config.lr, momentum=config.momentum, foreach=True)
    return AdamW(listed, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, foreach=True)


class TrainingBatches:
    """This replica's training batches without end, from the one that the module is at."""

    def __init__(self, text: TrainingText, module: LanguageModel) -> None:
        self.text, self.module = text, module

    def __iter__(self) -> Iterator[Tensor]:
        data = self.module.mesh.data
        number = self.module.data_position
        while True:
            yield torch.from_numpy(self.text.batch(number, data.rank, data.size))
            number += 1


class ValidationBatches:
    """This replica's share of the held-out batches, the same in each validation."""

    def __init__(self, text: TrainingText, module: LanguageModel) -> None:
        self.text, self.module = text, module

    def __iter__(self) -> Iterator[Tensor]:
        data, most = self.module.mesh.data, self.module.settings.data.validation_batches
        for tokens in self.text.validation(most, data.rank, data.size):
            yield torch.from_numpy(tokens)
