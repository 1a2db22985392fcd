"""What other libraries' tensor parallelisms have in common: a dense model cut over all ranks of the launch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from helix.parallel.methods.method import Job, Layout, Method
from helix.partition import wire
from helix.partition.grid import PartitionError


class LibraryTensorParallel(Method):
    """Every rank ends up with all logits[B, T, V].

    Raises:
        PartitionError: if there are experts, which neither library cuts as experts, or if n is not the number of
            ranks of the launch.
    """

    def __init__(self, job: Job, layout: Layout, name: str) -> None:
        super().__init__(job, layout)
        n, running = layout.grid.n, dist.get_world_size()
        if job.shape.experts:
            raise PartitionError(f"{name} runs the dense model only; use model=dense or another method")
        if n != running:
            raise PartitionError(f"{name} over {n} ranks needs a launch of {n}, not of {running}")

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        return None if output is None else output.flatten(0, 1)

    def all_reduce_bytes(self, width: int) -> int:
        """What a rank sends for the sum over all ranks of one number for each token and each of `width` features."""
        job = self.job
        return wire.all_reduce(job.batch * job.length * width, self.layout.grid.n, job.dtype.itemsize)
