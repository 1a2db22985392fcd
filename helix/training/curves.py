"""What happens while a model trains: losses and validations recorded, sent to W&B and shown as a progress bar."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer

from helix.comm import transport
from helix.config.train_schema import TrainConfig
from helix.flight.activity import enter
from helix.parallel.precision import HelixPrecision
from helix.study.tracking import Tracker
from helix.training.learner import NATS_PER_BIT, LanguageModel

_OF_STEPS = ("losses", "learning_rates", "gradient_norms", "loss_scales", "skipped_steps")


class Curves(Callback):
    """Records what every step was like and the time that training took; rank 0 logs it.

    Attributes:
        losses: of each optimizer step, in nats a token, the mean over its batches and the data replicas.
        learning_rates: that each of them was made with.
        gradient_norms: of each of them, before they were clipped; None where they are not, or where they overflowed.
        loss_scales: of 16-mixed, after each of them; None in any other precision.
        skipped_steps: numbers, from 1, of the steps that an overflow made all ranks skip.
        validations: (optimizer step, bits per byte).
        training_s: time spent in training batches; validations are not in it.
    """

    def __init__(self, settings: TrainConfig, tracker: Tracker) -> None:
        self.settings, self.tracker = settings, tracker
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.gradient_norms: list[float | None] = []
        self.loss_scales: list[float | None] = []
        self.skipped_steps: list[int] = []
        self.validations: list[tuple[int, float]] = []
        self.training_s = 0.0
        self.batches = 0
        # Since the last record, which fetches them from the device at once.
        self._steps: list[Tensor] = []
        self._norms: list[Tensor | None] = []
        self._began = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Training tokens of all replicas a second, the first batch, which prepares much, left out."""
        data = self.settings.data
        timed = max(1, self.batches - 1)
        return timed * data.batch_size * data.seq_len / self.training_s if self.training_s else float("nan")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        enter("training")
        self._began = _now(pl_module.device)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.learning_rates.append(optimizer.param_groups[0]["lr"])  # after the step it is the next one's

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.batches += 1
        if self.batches > 1:
            self.training_s += _now(pl_module.device) - self._began
        each = self.settings.trainer.accumulate_grad_batches
        if len(pl_module.losses) < each:
            return
        self._steps.append(torch.stack(pl_module.losses).mean())
        pl_module.losses.clear()
        limits = self.settings.trainer
        step = trainer.global_step
        self._note(step, trainer.precision_plugin)
        last = step >= limits.max_steps or trainer.should_stop
        # A checkpoint holds what is recorded.
        saves = limits.save_every_n_steps is not None and step % limits.save_every_n_steps == 0
        if last or saves or step % limits.log_every_n_steps == 0:
            self._record(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        enter("validation")
        assert isinstance(pl_module, LanguageModel)
        self._record(trainer, pl_module)  # W&B drops what comes after a later step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.validations.append((trainer.global_step, pl_module.validation_bpb))
        self.tracker.log({"validation/bpb": pl_module.validation_bpb}, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._record(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in (*_OF_STEPS, "validations")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _OF_STEPS:
            setattr(self, name, list(state_dict[name]))
        self.validations = [(step, bits) for step, bits in state_dict["validations"]]
        self._log(0)  # each W&B run holds the whole curve: those that end with a killed rank may hold nothing

    def _note(self, step: int, plugin: Any) -> None:
        """What the precision plugin knows of the step that it has just made."""
        assert isinstance(plugin, HelixPrecision)
        self._norms.append(plugin.gradient_norm)
        self.loss_scales.append(None if plugin.scaler is None else plugin.scaler.value)
        if plugin.scaler is not None and plugin.scaler.overflowed:
            self.skipped_steps.append(step)

    def _record(self, trainer: Trainer, module: LanguageModel) -> None:
        """The steps since the last record: their losses, averaged over the replicas in one exchange for all."""
        if not self._steps:
            return
        losses = torch.stack(self._steps)
        self._steps.clear()
        if module.mesh.data.size > 1:
            losses = transport.all_reduce(losses, module.mesh.data, "losses") / module.mesh.data.size
        before = len(self.losses)
        self.losses.extend(losses.tolist())
        self.gradient_norms.extend(
            float(norm) if norm is not None and norm.isfinite() else None for norm in self._norms
        )
        self._norms.clear()
        self._log(before)

    def _log(self, before: int) -> None:
        """What is recorded of the steps after so many; of those of an earlier start the validations, too."""
        bits = {} if self.batches else dict(self.validations)
        for step in range(before, len(self.losses)):
            logged = {
                "train/loss": self.losses[step],
                "train/bpb": self.losses[step] / NATS_PER_BIT,
                "learning_rate": self.learning_rates[step],
                "train/gradient_norm": self.gradient_norms[step],
                "train/loss_scale": self.loss_scales[step],
                "tokens_per_s": self.tokens_per_s if step == len(self.losses) - 1 and self.training_s else None,
                "validation/bpb": bits.get(step + 1),
            }
            known = {name: value for name, value in logged.items() if value is not None}
            self.tracker.log(known, step=step + 1)


def _now(device: torch.device) -> float:
    """The time once the device, which computes behind the CPU's back, has done what it was told so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


class Bar(Callback):
    """A progress bar over the optimizer's steps, on rank 0, with the latest loss and validation."""

    def __init__(self, settings: TrainConfig, curves: Curves) -> None:
        self.settings, self.curves = settings, curves
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=dist.get_rank() != 0,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.start()
        total = self.settings.trainer.max_steps
        self._task = self._progress.add_task("training", total=total, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        said = []
        if self.curves.losses:
            said.append(f"loss {self.curves.losses[-1] / NATS_PER_BIT:.3f}")
        if self.curves.validations:
            said.append(f"validation {self.curves.validations[-1][1]:.3f}")
        description = f"{', '.join(said)} bits per byte" if said else "training"
        self._progress.update(self._task, completed=trainer.global_step, description=description)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._progress.stop()
