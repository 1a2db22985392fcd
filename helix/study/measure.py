"""Timing a partitioned model's forward steps under Lightning's predict loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from helix.comm.record import record
from helix.models.transformer import Transformer
from helix.parallel.strategy import HelixStrategy
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.study.tracking import Tracker


class BenchmarkModule(LightningModule):
    """A transformer with seeded weights whose predict step is one forward pass."""

    def __init__(
        self, shape: TransformerShape, options: AttentionOptions, ep_size: int, dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__()
        self.shape, self.options, self.ep_size, self.seed = shape, options, ep_size, seed
        self.model_dtype = dtype
        self.model: Transformer | None = None

    def configure_model(self) -> None:
        if self.model is None:
            strategy = self.trainer.strategy
            assert isinstance(strategy, HelixStrategy)
            with torch.device(strategy.root_device):
                self.model = Transformer(self.shape, strategy.mesh, self.options, self.ep_size, self.model_dtype)
            self.model.init_weights(self.seed)

    def predict_step(self, tokens: Tensor, index: int) -> Tensor:
        assert self.model is not None
        return self.model(tokens)


@dataclass
class Measured:
    """One rank's figures.

    Args:
        step_s: seconds of each timed step, [runs][iterations].
        comm_s: seconds inside collectives over each run's timed steps, waiting included.
        weight_bytes: bytes of this rank's parameters.
        activation_bytes: growth of this rank's memory over the first step. On CUDA the allocator's peak over
            the weights; on the CPU the process's resident set, so library buffers count.
        peak_bytes: weights and activations together.
    """

    step_s: list[list[float]] = field(default_factory=list)
    comm_s: list[float] = field(default_factory=list)
    weight_bytes: int = 0
    activation_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


class Stopwatch(Callback):
    """Times each predict step, from all ranks together to this rank's end, and shows the progress on rank 0."""

    def __init__(self, warmup: int, iterations: int, runs: int, tokens_per_step: int, tracker: Tracker) -> None:
        self.warmup, self.iterations, self.runs = warmup, iterations, runs
        self.tokens_per_step, self.tracker = tokens_per_step, tracker
        self.measured = Measured()
        self._progress = _progress_bar()
        self._listening = ExitStack()
        self._begin = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.start()
        self._task = self._progress.add_task("warm-up", total=self.runs * (self.warmup + self.iterations))
        self.measured.weight_bytes = sum(_local_bytes(p) for p in pl_module.parameters())
        self._memory = PeakMemory(pl_module.device)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        run, step = divmod(batch_idx, self.warmup + self.iterations)
        if step == self.warmup:
            self.measured.step_s.append([])
            self._log = self._listening.enter_context(record())
        self._progress.update(self._task, description=f"run {run + 1} of {self.runs}")
        dist.barrier()
        self._begin = time.perf_counter()

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
        seconds = time.perf_counter() - self._begin
        if batch_idx == 0:
            self.measured.activation_bytes = self._memory.growth()
        run, step = divmod(batch_idx, self.warmup + self.iterations)
        self._progress.advance(self._task)
        if step < self.warmup:
            return
        self.measured.step_s[run].append(seconds)
        metrics = {"run": run, "step_ms": seconds * 1e3, "tokens_per_s": self.tokens_per_step / seconds}
        self.tracker.log(metrics, step=batch_idx)
        if step == self.warmup + self.iterations - 1:
            self._end_run()

    def _end_run(self) -> None:
        self.measured.comm_s.append(sum(self._log.seconds.values()))
        self._listening.close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._progress.stop()


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=dist.get_rank() != 0)


class PeakMemory:
    """Growth of the memory that is in use, from now to its peak."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            _reset_resident_peak()
            self.before = psutil.Process().memory_info().rss

    def growth(self) -> int:
        """Bytes in use at the peak since the start, less what was in use then."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else _resident_peak()
        return max(0, peak - self.before)


def _reset_resident_peak() -> None:
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # 5: the peak of the resident set starts anew (proc(5))


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # without procfs: what is resident now
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _local_bytes(parameter: Tensor) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()


class _Steps(Dataset[Tensor]):
    """Step i's tokens[B, T] for this data replica, cycling through the batches."""

    def __init__(self, batches: Tensor, steps: int, replica: int, replicas: int) -> None:
        self.batches, self.steps = batches.chunk(replicas, dim=1)[replica], steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.steps:
            raise IndexError(index)
        return self.batches[index % len(self.batches)]


def step_loader(batches: Tensor, steps: int, data: int) -> DataLoader[Tensor]:
    """One batch a step. The mesh's outermost axis is data, so replica = rank // (ranks of a replica).

    Args:
        batches: [number, batch_size, seq_len].
        steps: how many steps.
        data: replicas, which divide batch_size.
    """
    replica = dist.get_rank() // (dist.get_world_size() // data)
    return DataLoader(_Steps(batches, steps, replica, data), batch_size=None)
