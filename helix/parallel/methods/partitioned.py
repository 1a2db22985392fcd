"""Helix itself as one method among others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from torch import Tensor

from helix.comm.mesh import Mesh
from helix.models.transformer import Transformer
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition.between_hosts import Pairs, between_hosts
from helix.partition.rivals import check_replicas
from helix.partition.transformer_cost import TransformerCost


class Partitioned(Method):
    """`helix_4x4` and the like, with data replicas.

    Args:
        mesh: the mesh of the Trainer's strategy, if that runs this method.

    Raises:
        PartitionError: if the grid does not fit the model.
    """

    def __init__(self, job: Job, layout: Layout, mesh: Mesh | None = None) -> None:
        super().__init__(job, layout)
        check_replicas(job.batch, layout.data)
        with job.device:
            self.model: Transformer = Transformer(
                job.shape, mesh or self.mesh(), layout.options, layout.ep_size, job.dtype
            )
        job.fill(self.model)

    def step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.chunk(self.layout.data)[self.model.mesh.data.rank])

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        assert output is not None
        whole = self.model.whole_logits(output)
        return self.gather(whole if self.model.mesh.model.rank == 0 else None)

    @property
    def cost(self) -> TransformerCost:
        """Closed forms of one replica."""
        job, layout = self.job, self.layout
        batch, itemsize = job.batch // layout.data, job.dtype.itemsize
        return TransformerCost(job.shape, layout.grid, layout.options, batch, job.length, itemsize, layout.ep_size)

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        mesh = self.model.mesh
        own = [each.chunk(self.layout.data)[mesh.data.rank] for each in routes]
        return self.cost.bytes(mesh.model.rank, self.capacities(own, self.layout.grid.ranks, mesh.model.rank))

    def predicted_between(self, routes: list[Tensor], hosts: Sequence[int]) -> dict[str, Pairs]:
        ranks, out = self.layout.grid.ranks, defaultdict[str, Pairs](Counter)
        for replica in range(self.layout.data):
            own = [each.chunk(self.layout.data)[replica] for each in routes]
            capacities = [self.capacities(own, ranks, rank) for rank in range(ranks)]
            for key, pairs in between_hosts(self.cost, hosts[replica * ranks :][:ranks], capacities).items():
                out[key] += pairs
        return dict(out)

    def predicted_weight_bytes(self) -> int:
        return self.cost.weight_bytes(self.model.mesh.model.rank)
