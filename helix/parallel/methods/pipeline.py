"""Tensor parallelism within the stages of a pipeline: DTensor x `torch.distributed.pipelining`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from helix.models.plain import PlainTransformer
from helix.parallel.methods.method import Job, Layout
from helix.parallel.methods.tensor import TensorParallel
from helix.partition import rivals


class TensorPipeline(TensorParallel):
    """`tp8_pp2`: GPipe over the stages, forward, each stage tensor parallel over n ranks.

    Raises:
        PartitionError: if the layout does not fit the job; see `tensor_part`.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout)
        self.bubble = rivals.bubble(layout.stage, layout.microbatches)
        group = self.ranks.device_mesh["stage"].get_group()
        self.axes[group.group_name] = "stage"
        part = _Stage(self.model, job.length, job.device)
        stage = PipelineStage(part, self.ranks.stage.rank, layout.stage, job.device, group=group)
        self.schedule = ScheduleGPipe(stage, layout.microbatches)

    def step(self, tokens: Tensor) -> Tensor | None:
        logits: Tensor | None = self.schedule.eval(self.own(tokens)) if self.first else self.schedule.eval()
        return logits if self.last else None


class _Stage(nn.Module):
    """A stage's part of the model, which is told the positions: the length of what it gets may be a rank's share."""

    def __init__(self, model: PlainTransformer, length: int, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.positions = torch.arange(length, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.positions)
