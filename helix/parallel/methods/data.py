"""Data parallelism: the whole model on every rank, each with samples of its own."""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist
from torch import Tensor

from helix.comm.mesh import Mesh
from helix.models.plain import PlainTransformer
from helix.parallel.methods.experts import expert_layers
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition import rivals
from helix.partition.grid import Grid
from helix.partition.transformer_cost import expert_bytes


class DataParallel(Method):
    """`dp16`. In a forward pass nothing moves between replicas, except to the experts, which they share.

    Where there are fewer samples than replicas the last ones are idle.

    Raises:
        PartitionError: if there are experts, whose exchange needs equally many samples on every replica, and the
            replicas do not divide the samples.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout)
        rivals.check_data(job.shape, layout.data, job.batch)
        self.idle_ranks = max(0, layout.data - job.batch)
        self.rank = dist.get_rank()
        # The experts lie across the replicas, which are one axis for them.
        replicas = Mesh(Grid(1, layout.data), device_type=job.device.type)
        with job.device:
            experts = expert_layers(job, replicas, layout.ep_size, sharded=True)
            self.model: PlainTransformer = PlainTransformer(job.shape, job.dtype, experts)
            job.fill(self.model)

    def step(self, tokens: Tensor) -> Tensor | None:
        own = tokens.tensor_split(self.layout.data)[self.rank]
        return self.model(own) if len(own) else None

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        return self.gather(None if output is None else output.flatten(0, 1))

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        capacities = self.capacities(routes, self.layout.data, self.rank)
        return expert_bytes(self.job.shape, self.layout.ep_size, capacities, self.job.dtype.itemsize)

    def predicted_weight_bytes(self) -> int:
        return rivals.replica_weight_bytes(self.job.shape, self.job.dtype.itemsize, self.layout.ep_size)
