"""`HelixCheckpoints`: a Lightning Trainer that saves as it goes and continues where it was.

    Trainer(strategy=HelixStrategy(Grid(2, 2)), callbacks=[HelixCheckpoints("checkpoints", every_n_steps=50)], ..)

Not Lightning's own checkpoints, which gather the whole model on rank 0 or pickle one rank's objects.
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from helix.checkpoint.content import plain
from helix.checkpoint.manifest import checkpoints
from helix.checkpoint.save_and_load import BackgroundSaver, CheckpointError, Loaded, Saved, restore, save
from helix.flight.activity import activity


class HelixCheckpoints(Callback):
    """Saves every n optimizer steps and at the end, and resumes before the first step.

    A step's save comes when all of the step has been done, its validation included: before the next batch, or when
    training ends. So a resumed run validates where the uninterrupted one does, and as often.

    What comes back: parameters, optimizers, learning-rate schedules, the loops' progress (global step, epoch, batch),
    the loss scaler, `module.data_position` if the module has that attribute, the plain state of other callbacks
    (such as Lightning's Timer for `max_time`), what the module's `on_save_checkpoint` put into its dict (plain
    values), and each rank's random-number generators. On another number of ranks the generators are rank 0's for
    all; nothing else depends on the grid. A callback that comes before this one in the Trainer's list is asked for
    its state after its own `on_train_batch_start` and `on_train_end`, and the others before theirs.
    Where training ends between two optimizer steps, the batches after the last step are seen once more.

    The optimizers' options and the schedules come back as they were saved, not as `configure_optimizers` has them: a
    module that is to go on with another learning rate sets it in its own `on_fit_start`, which comes later.

    Args:
        folder: of the checkpoints; all ranks see it.
        every_n_steps: optimizer steps from one save to the next; None for one at the end only.
        keep: how many are left; None for all.
        resume: "latest" (the newest whole one of `folder`; from the start if it has none), a path of a checkpoint or
            of another folder of them, or None to start anew.
        background: whether training goes on while the disk is written; see `BackgroundSaver`.

    Attributes:
        resumed: what was loaded, if anything was.
        last: the last save that is known to be whole.

    Raises:
        CheckpointError: if `resume` names what cannot be loaded, or a save failed.
    """

    def __init__(
        self,
        folder: Path | str,
        every_n_steps: int | None = None,
        keep: int | None = 3,
        resume: Path | str | None = "latest",
        background: bool = False,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise CheckpointError(f"every_n_steps must be at least 1, not {every_n_steps}; None saves at the end only")
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self.resume, self.background = resume, background
        self.resumed: Loaded | None = None
        self.last: Saved | None = None
        self._saver: BackgroundSaver | None = None
        self._saved_step = self._seen_step = 0
        self._due = self._between_steps = False
        self._stood: _Stood | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning restores its own checkpoints right after this hook: the optimizers are there, the loops and the
        # training data not yet begun.
        self._saver = BackgroundSaver() if self.background else None
        self.resumed, self._stood, self._due = None, None, False
        self._saved_step = self._seen_step = trainer.global_step
        source = self._source(trainer)
        if source is None:
            return
        self.resumed = restore(source, pl_module, trainer.optimizers)
        _set_state(trainer, pl_module, self.resumed, self)
        self._saved_step = self._seen_step = trainer.global_step
        rank_zero_info(f"resumed after step {self.resumed.step}; {self.resumed}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.resumed is None:
            return
        _log(trainer, {"checkpoint/load_s": self.resumed.seconds, "checkpoint/load_bytes": self.resumed.nbytes})
        # Late, since Lightning's set-up of loaders draws from them.
        states = self.resumed.extra["random"]
        _set_random(states[trainer.global_rank if len(states) == trainer.world_size else 0])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._between_steps = step == self._seen_step  # gradients were accumulated, and that was all
        if self._between_steps:
            return
        self._seen_step = step
        # What is saved later has to say how everything stood at the step: time may end a training between two.
        position = getattr(pl_module, "data_position", None)
        self._stood = _Stood(trainer.fit_loop.state_dict(), position, _random())
        self._due = self.every_n_steps is not None and step % self.every_n_steps == 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning validates after the hook above, and a resumed run would not do so again.
        if self._stood is not None and not self._between_steps:
            self._stood.draws = _random()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._due:  # but its generators as they were before this batch was fetched: the resumed run fetches it too
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_step and self._stood is not None:
            self._save(trainer, pl_module)
        if self._saver is not None:
            self._report(trainer, self._saver.wait())

    def _source(self, trainer: Trainer) -> Path | None:
        if self.resume is None:
            return None
        if str(self.resume) != "latest":
            return Path(self.resume)
        # Rank 0's answer for all: the folder may be listed at slightly different times.
        return self.folder if trainer.strategy.broadcast(bool(checkpoints(self.folder))) else None

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._stood is not None
        self._saved_step, self._due = trainer.global_step, False
        write = save if self._saver is None else self._saver.save
        with activity("save"):
            extra = _state(trainer, module, self._stood, self)
            saved = write(self.folder, module, trainer.optimizers, extra, self.keep, step=self._saved_step)
        self._report(trainer, saved)

    def _report(self, trainer: Trainer, saved: Saved | None) -> None:
        if saved is None:
            return
        self.last = saved
        rank_zero_info(str(saved))
        _log(
            trainer,
            {
                "checkpoint/save_s": saved.seconds,
                "checkpoint/held_s": saved.held_s,
                "checkpoint/save_bytes": saved.nbytes,
            },
        )


@dataclass
class _Stood:
    """How the loops, the data and this rank's generators stood after an optimizer step."""

    loops: dict[str, Any]
    position: Any
    draws: dict[str, Any]


def _state(trainer: Trainer, module: LightningModule, stood: _Stood, own: HelixCheckpoints) -> dict[str, Any]:
    """What a resumed run needs besides tensors, as plain values; equal on all ranks but for `random`."""
    extra: dict[str, Any] = {
        "step": trainer.global_step,
        "loops": stood.loops,
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": _numbers(trainer.precision_plugin.state_dict()),
        "callbacks": _callbacks(trainer, own),
        "random": _everyones(stood.draws),
        "module": {},
    }
    module.on_save_checkpoint(extra["module"])
    if stood.position is not None:
        extra["data_position"] = stood.position
    return extra


def _set_state(trainer: Trainer, module: LightningModule, loaded: Loaded, own: HelixCheckpoints) -> None:
    extra, schedules = loaded.extra, trainer.lr_scheduler_configs
    if "loops" not in extra:
        raise CheckpointError(f"{loaded.path} holds weights only, without a run to resume; load it with `load`")
    if len(extra["schedules"]) != len(schedules):
        raise CheckpointError(
            f"the checkpoint {loaded.path} has {len(extra['schedules'])} learning-rate schedules, and the module "
            f"{len(schedules)}"
        )
    trainer.fit_loop.load_state_dict(extra["loops"])
    for config, state in zip(schedules, extra["schedules"], strict=True):
        config.scheduler.load_state_dict(state)
    if extra["precision"]:
        trainer.precision_plugin.load_state_dict(extra["precision"])
    for callback in _others(trainer, own):
        if callback.state_key in extra["callbacks"]:
            callback.load_state_dict(extra["callbacks"][callback.state_key])
    module.on_load_checkpoint(extra["module"])
    if "data_position" in extra:
        module.data_position = extra["data_position"]


def _others(trainer: Trainer, own: HelixCheckpoints) -> list[Callback]:
    return [callback for callback in trainer.callbacks if callback is not own]  # type: ignore[attr-defined]


def _callbacks(trainer: Trainer, own: HelixCheckpoints) -> dict[str, Any]:
    """The state of the callbacks whose state is plain values; the others' start anew."""
    states = {}
    for callback in _others(trainer, own):
        try:
            state = plain(_numbers(callback.state_dict()), callback.state_key)
        except CheckpointError:
            continue
        if state:
            states[callback.state_key] = state
    return states


def _numbers(value: Any) -> Any:
    """Tensors of one element as numbers, within dicts."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _random() -> dict[str, Any]:
    """The states of this rank's generators."""
    version, words, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    inner = generator["state"]
    state = {
        "torch": _encode(torch.get_rng_state()),
        "python": [version, list(words), gauss],
        "numpy": generator | {"state": inner | {"key": inner["key"].tolist()}},
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(_decode(state["torch"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state(state["numpy"] | {"state": inner | {"key": np.array(inner["key"], dtype=np.uint32)}})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _everyones(value: dict[str, Any]) -> list[Any]:
    """Every rank's value, on rank 0, whose `extra` is written; a rank's own on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or [value]


def _log(trainer: Trainer, figures: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)
