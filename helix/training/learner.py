"""The language model that `train.py` trains, as a LightningModule, and its batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from helix.checkpoint.asked import fixed
from helix.comm import transport
from helix.comm.mesh import Mesh
from helix.config.schema import expert_parallel, to_shape
from helix.config.train_schema import OptimizerConfig, TrainConfig
from helix.models.loss import LoadBalance, cross_entropy
from helix.models.transformer import Transformer
from helix.parallel.methods.method import Job, Layout
from helix.parallel.pipeline import Pipeline, Stream
from helix.parallel.strategy import HelixStrategy
from helix.parallel.tensor_parallel import tensor_part
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
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
        self._options: list[dict[str, Any]] = []

    @property
    def mesh(self) -> Mesh:
        strategy = self.trainer.strategy
        assert isinstance(strategy, HelixStrategy)
        return strategy.mesh

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        settings, shape = self.settings, to_shape(self.settings.model)
        ep_size = expert_parallel(settings.model, settings.parallel)
        dtype = DTYPES.get(settings.precision, torch.float32)
        if settings.parallel.method == "tensor":
            self.model: nn.Module = self._tensor_part(shape, ep_size, dtype)
        else:
            self.model = Transformer(shape, self.mesh, self.options, ep_size, dtype)
            self.model.init_weights(settings.seed)
        balanced = settings.model.experts > 0 and settings.auxiliary_weight > 0
        self.balance = LoadBalance(self.model, shape, self.mesh) if balanced else None
        self.pipeline = self._pipeline(shape, dtype) if settings.parallel.stage > 1 else None

    def _tensor_part(self, shape: TransformerShape, ep_size: int, dtype: torch.dtype) -> nn.Module:
        """This rank's part of PyTorch's tensor parallelism, with the same weights as any other method's."""
        parallel, data = self.settings.parallel, self.settings.data
        # Of logits that came out of a DTensor; nothing changes them in place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .*PlainTransformer\) returned a view", UserWarning)
        device = self.trainer.strategy.root_device
        job = Job(shape, data.batch_size, data.seq_len, dtype, device, self.settings.seed)
        layout = Layout(self.mesh.grid, parallel.data, parallel.stage, self.options, ep_size, parallel.microbatches)
        return tensor_part(job, layout, self.mesh)

    def _pipeline(self, shape: TransformerShape, dtype: torch.dtype) -> Pipeline:
        parallel, data = self.settings.parallel, self.settings.data
        shards = self.mesh.model.size if self.options.residual == "sharded" else 1
        tokens = data.batch_size // parallel.data // parallel.microbatches * data.seq_len
        balances = None if self.balance is None else partial(self.balance.losses, tokens)
        stream = Stream(shape.width, shards, dtype)
        return Pipeline(self._stage, stream, self.mesh.stage, parallel.microbatches, balances)

    def _stage(self, x: Tensor, targets: Tensor) -> Tensor:
        """A pipeline stage's share of `forward`; see `helix.parallel.pipeline.Part`."""
        # x may be a rank's share of the sequence, and attention is on the whole of it.
        y: Tensor = self.model(x, torch.arange(targets.shape[1], device=targets.device))
        return self._cross_entropy(y, targets) if self.mesh.stage.rank == self.mesh.stage.size - 1 else y

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits[.., V@model], targets[B, T] -> [B * T]."""
        return cross_entropy(logits.flatten(0, -2), targets.flatten(), self.settings.model.vocab, self.mesh.model)

    def forward(self, batch: Tensor) -> Tensor:
        """batch[B, T + 1] -> the loss of each token [B * T], in nats, the same on all ranks of a replica."""
        return self._losses(batch)[0]

    def _losses(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward`, and this rank's summand of the experts' load-balancing loss, if that is trained on."""
        tokens, targets = batch[:, :-1], batch[:, 1:]
        if self.pipeline is not None:
            return self.pipeline(tokens, targets)
        losses = self._cross_entropy(self.model(tokens), targets)
        return losses, self.balance.loss(losses.numel()) if self.balance and torch.is_grad_enabled() else None

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        losses, balance = self._losses(batch)
        loss = losses.mean()
        self.losses.append(loss.detach())
        self.data_position += 1  # here, since callbacks that save it come before this module's own hooks
        return loss if balance is None else loss + self.settings.auxiliary_weight * balance

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
        self._options = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """What is configured holds, and not what a checkpoint brought back just before."""
        config, steps = self.settings.optimizer, self.settings.trainer.max_steps
        (optimizer,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        scheduler = schedule.scheduler
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [config.lr for _ in self._options]
        for group, options in zip(optimizer.param_groups, self._options, strict=True):
            # The rate as `LambdaLR` has it, bit for bit.
            group.update(options, lr=config.lr * lr_factor(scheduler.last_epoch, steps, config))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fixed"] = fixed(self.settings)


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


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer by its config name. Weights are decayed; norms, and whatever else scales features, are not."""
    groups: dict[tuple[int, DeviceMesh | None], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((_kind(name), mesh), []).append(parameter)
    # `foreach` dispatches once for all of a group's DTensors, which have to be on one mesh, and not once for each:
    # 3.5 ms a step instead of 11 on one CPU core, for a model of two layers. Every method has each kind on one mesh,
    # and so the same groups in the same order, with which a checkpoint of one method goes on in another.
    listed = [
        {"params": groups[kind, mesh], "weight_decay": config.weight_decay if kind in _DECAYED else 0.0}
        for kind, mesh in sorted(groups, key=lambda each: each[0])
    ]
    if config.name == "sgd":
        return SGD(listed, lr=config.lr, momentum=config.momentum, foreach=True)
    return AdamW(listed, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, foreach=True)


_EXPERT, _ROUTER, _HEAD_NORM, _NORM, _ATTENTION, _REST = range(6)
_DECAYED = (_EXPERT, _ROUTER, _ATTENTION, _REST)


def _kind(name: str) -> int:
    """What a parameter is, by its name, which both transformers have alike."""
    if ".deepspeed_experts." in name:
        return _EXPERT
    if ".gate." in name:
        return _ROUTER
    attention = ".attention." in name
    if "norm" in name:
        return _HEAD_NORM if attention else _NORM
    return _ATTENTION if attention else _REST


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
