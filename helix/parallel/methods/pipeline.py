"""Tensor parallelism within the stages of a pipeline: DTensor x `torch.distributed.pipelining`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from helix.models.plain import PlainTransformer
from helix.parallel.methods.experts import expert_layers
from helix.parallel.methods.method import Job, Layout, Method
from helix.parallel.methods.tensor import (
    by_sequence,
    join_vocabulary,
    name_tensor,
    tensor_cost,
    tensor_parallel,
)
from helix.partition import rivals
from helix.partition.grid import shard_range
from helix.partition.transformer_cost import expert_bytes


class TensorPipeline(Method):
    """`tp8_pp2`: GPipe over the stages, forward, each stage tensor parallel over n ranks.

    Raises:
        PartitionError: if there are fewer layers than stages, the microbatches do not divide a replica's batch, or
            tensor parallelism cannot cut the heads.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout)
        ranks, self.sequence = layout.grid.ranks, layout.options.residual == "sharded"
        rivals.check_replicas(job.batch, layout.data)
        rivals.check_tensor(job.shape, ranks, job.length if self.sequence else None)
        self.batch = job.batch // layout.data
        rivals.check_pipeline(job.shape, layout.stage, self.batch, layout.microbatches)
        self.ranks = self.mesh()
        self.stage = self.ranks.stage.rank
        self.first, self.last = self.stage == 0, self.stage == layout.stage - 1
        self.bubble = rivals.bubble(layout.stage, layout.microbatches)
        self.model = self._build()
        group = self.ranks.device_mesh["stage"].get_group()
        self.axes[group.group_name] = "stage"
        part = _Stage(self.model, job.length, job.device)
        stage = PipelineStage(part, self.stage, layout.stage, job.device, group=group)
        self.schedule = ScheduleGPipe(stage, layout.microbatches)

    def _build(self) -> PlainTransformer:
        job, layout = self.job, self.layout
        with job.device:
            experts = expert_layers(job, self.ranks, layout.ep_size, self.sequence)
            model = PlainTransformer(job.shape, job.dtype, experts)
            model.init_weights(job.seed)
        model.keep_layers(rivals.stage_layers(job.shape.layers, layout.stage, self.stage))
        if layout.grid.ranks > 1:
            tensor = self.ranks.device_mesh["head"]
            tensor_parallel(model, tensor, self.sequence)
            self.axes |= name_tensor(tensor)
        return model

    def step(self, tokens: Tensor) -> Tensor | None:
        own = tokens.chunk(self.layout.data)[self.ranks.data.rank]
        logits: Tensor | None = self.schedule.eval(own) if self.first else self.schedule.eval()
        return logits if self.last else None

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        whole = None if output is None else join_vocabulary(output, self.ranks, self.job.shape.vocab)
        return self.gather(whole if self.ranks.model.rank == 0 else None)

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        job, layout, rank, ranks = self.job, self.layout, self.ranks.model.rank, self.layout.grid.ranks
        layers = rivals.stage_layers(job.shape.layers, layout.stage, self.stage)
        own = [each.chunk(layout.data)[self.ranks.data.rank] for each in routes][layers.start : layers.stop]
        pieces = [piece for each in own for piece in each.chunk(layout.microbatches)]
        size = self.batch // layout.microbatches
        if self.sequence:
            pieces = [by_sequence(piece, size, ranks) for piece in pieces]
        cost = tensor_cost(self._part(len(layers)), layout, size)
        capacities = self.capacities(pieces, ranks, rank)  # of each layer and microbatch
        out = rivals.tensor_bytes(cost, rank, capacities, self.first, self.last)
        exchanged = expert_bytes(job.shape, layout.ep_size, capacities, job.dtype.itemsize)
        for key in out.keys() - exchanged.keys():
            out[key] *= layout.microbatches
        if not self.last:
            shard = job.length // ranks if self.sequence else job.length
            out["send/stage"] = self.batch * shard * job.shape.width * job.dtype.itemsize
        return +out

    def predicted_weight_bytes(self) -> int:
        job, layout, rank = self.job, self.layout, self.ranks.model.rank
        layers = rivals.stage_layers(job.shape.layers, layout.stage, self.stage)
        cost = tensor_cost(self._part(len(layers)), layout, 1)
        shape, itemsize = job.shape, job.dtype.itemsize
        vocabulary = len(shard_range(shape.vocab, layout.grid.ranks, rank)) * shape.width * itemsize
        without = (0 if self.first else vocabulary) + (0 if self.last else vocabulary + shape.width * itemsize)
        return cost.weight_bytes(rank) - without

    def _part(self, layers: int) -> Job:
        """The job of a model that has this stage's layers only."""
        return replace(self.job, shape=replace(self.job.shape, layers=layers))


class _Stage(nn.Module):
    """A stage's part of the model, which is told the positions: the length of what it gets may be a rank's share."""

    def __init__(self, model: PlainTransformer, length: int, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.positions = torch.arange(length, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.positions)
