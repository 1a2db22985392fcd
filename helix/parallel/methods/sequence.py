"""What methods that cut the sequence have in common: the weights on every rank, the tokens cut over all of them."""

from __future__ import annotations

from helix.comm.mesh import Mesh
from helix.models.plain import PlainTransformer
from helix.parallel.methods.experts import expert_layers
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition import rivals
from helix.partition.grid import Grid, PartitionError


class SequenceMethod(Method):
    """The plain model, filled, whose attention the method has to extend over the ranks.

    Attributes:
        sequence: all ranks of the launch, as a one-dimensional device mesh.

    Raises:
        PartitionError: if the ranks do not divide the length, or are not all ranks of the launch.
    """

    def __init__(self, job: Job, layout: Layout, name: str) -> None:
        super().__init__(job, layout)
        n = layout.grid.n
        if job.length % n:
            raise PartitionError(f"{name} over {n} ranks needs a length that they divide, not {job.length}")
        ranks = Mesh(Grid(1, n), device_type=job.device.type)
        self.sequence = ranks.flat
        self.axes = {self.sequence.get_group().group_name: "sequence"}
        with job.device:
            experts = expert_layers(job, ranks, layout.ep_size, sharded=True)
            self.model: PlainTransformer = PlainTransformer(job.shape, job.dtype, experts).eval()
            job.fill(self.model)

    def predicted_weight_bytes(self) -> int:
        return rivals.replica_weight_bytes(self.job.shape, self.job.dtype.itemsize, self.layout.ep_size)
