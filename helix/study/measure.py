"""Timing the methods' forward steps under Lightning's predict loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from helix.checkpoint.content import CheckpointError
from helix.comm.record import Span, record
from helix.config.schema import WorkloadConfig
from helix.flight.activity import enter
from helix.parallel.methods.method import Job, Layout, Method
from helix.parallel.strategy import HelixStrategy
from helix.study.accuracy import Oracle
from helix.study.progress import progress_bar
from helix.study.tracking import Tracker
from helix.study.trial import Refused, Trial, try_out
from helix.study.turns import Kind, Turn, take_turns


class BenchmarkModule(LightningModule):
    """The methods of one launch, whose predict step is one forward pass of the one whose turn it is.

    Args:
        layouts: kind and layout of each method, by name; the first one is the Trainer's strategy's.
        job: what all of them compute.
        batches: tokens[number, B, T].

    Attributes:
        methods: those that run, from `configure_model` on.
        trials: their first steps.
        refusals: why the others do not.
    """

    def __init__(self, layouts: dict[str, tuple[str, Layout]], job: Job, batches: Tensor) -> None:
        super().__init__()
        self.layouts, self.job, self.batches = layouts, job, batches
        self.methods: dict[str, Method] = {}
        self.trials: dict[str, Trial] = {}
        self.refusals: dict[str, str] = {}

    def configure_model(self) -> None:
        if self.methods:
            return
        strategy = self.trainer.strategy
        assert isinstance(strategy, HelixStrategy)
        oracle = Oracle(self.job, self.batches[0])
        tokens = self.batches[0].to(self.job.device)
        for number, (name, (kind, layout)) in enumerate(self.layouts.items()):
            mesh = strategy.mesh if number == 0 else None
            try:
                self.methods[name], self.trials[name] = try_out(kind, layout, self.job, tokens, oracle, mesh)
            except Refused as refused:
                if number == 0 and isinstance(refused.__cause__, CheckpointError):
                    raise refused.__cause__ from None  # the weights that were asked for, not the method
                if number == 0:
                    raise RuntimeError(f"{name} cannot run: {refused}") from refused.__cause__
                self.refusals[name] = str(refused)

    def transfer_batch_to_device(
        self, batch: tuple[Turn, Tensor], device: torch.device, dataloader_idx: int
    ) -> tuple[Turn, Tensor]:
        turn, tokens = batch
        return turn, tokens.to(device)

    def predict_step(self, batch: tuple[Turn, Tensor], index: int) -> Tensor:
        turn, tokens = batch
        logits = self.methods[turn.method].step(tokens)
        return tokens[:0] if logits is None else logits  # Lightning takes None for a mistake


@dataclass(frozen=True)
class Recorded:
    """One rank's recorded step: when it began and ended on the machine's clock, and its collectives."""

    start_s: float
    end_s: float
    spans: list[Span]


@dataclass
class Measured:
    """One rank's steps of one method, by run.

    Args:
        steps: (start, end) of each timed step in seconds of the machine's clock.
        recorded: the recorded step.
    """

    steps: list[list[tuple[float, float]]] = field(default_factory=list)
    recorded: list[Recorded] = field(default_factory=list)


class Stopwatch(Callback):
    """Times each step, from all ranks together to this rank's end, and shows the progress on rank 0."""

    def __init__(self, workload: WorkloadConfig, tracker: Tracker) -> None:
        self.workload, self.tracker = workload, tracker
        self.measured: dict[str, Measured] = defaultdict(Measured)
        self._progress = progress_bar()
        self._recording = ExitStack()
        self._begin = 0.0
        self._metrics: dict[str, float] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BenchmarkModule)
        work = self.workload
        self._first = next(iter(pl_module.methods))
        passes = work.runs * (work.warmup + work.iterations + 1)
        self._progress.start()
        self._task = self._progress.add_task("warm-up", total=passes * len(pl_module.methods))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        turn: Turn = batch[0]
        assert isinstance(pl_module, BenchmarkModule)
        run = f"run {turn.run + 1} of {self.workload.runs}"
        enter(f"{'warm-up' if turn.kind is Kind.WARMUP else 'measurement'}, {run}")
        self._progress.update(self._task, description=f"{run}: {turn.method}")
        dist.barrier()
        if turn.kind is Kind.RECORDED:
            self._log = self._recording.enter_context(record())
            self._recording.enter_context(pl_module.methods[turn.method].observed())
        self._begin = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        end = time.monotonic()
        turn: Turn = batch[0]
        self._progress.advance(self._task)
        self._progress.refresh()
        if turn.kind is Kind.RECORDED:
            self._recording.close()
            self.measured[turn.method].recorded.append(Recorded(self._begin, end, list(self._log.spans)))
        elif turn.kind is Kind.TIMED:
            runs = self.measured[turn.method].steps
            if len(runs) <= turn.run:
                runs.append([])
            runs[turn.run].append((self._begin, end))
            self._track(turn, end - self._begin)

    def _track(self, turn: Turn, seconds: float) -> None:
        """One record of the W&B run for each pass: rank 0's own step, which a later rank may outlast."""
        prefix = "" if turn.method == self._first else f"{turn.method}/"
        self._metrics[f"{prefix}rank0_step_ms"] = seconds * 1e3
        if turn.ends_pass:
            self.tracker.log({"run": turn.run} | self._metrics, step=turn.batch)
            self._metrics = {}

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._recording.close()
        self._progress.stop()


class _Turns(IterableDataset[tuple[Turn, Tensor]]):
    """Each turn with its tokens[B, T], cycling through the batches; asked once the module knows who runs."""

    def __init__(self, module: BenchmarkModule, workload: WorkloadConfig) -> None:
        self.module, self.workload = module, workload

    def __iter__(self) -> Iterator[tuple[Turn, Tensor]]:
        work, batches = self.workload, self.module.batches
        for turn in take_turns(list(self.module.methods), work.warmup, work.iterations, work.runs):
            yield turn, batches[turn.batch % len(batches)]


def turn_loader(module: BenchmarkModule, workload: WorkloadConfig) -> DataLoader[tuple[Turn, Tensor]]:
    """A step for each turn; every rank gets the whole batch."""
    return DataLoader(_Turns(module, workload), batch_size=None)
