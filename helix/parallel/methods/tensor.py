"""Tensor parallelism, and data replicas of it: `helix.parallel.tensor_parallel`, measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from helix.comm.mesh import Mesh
from helix.models.plain import PlainTransformer
from helix.parallel.methods.method import Job, Layout, Method
from helix.parallel.tensor_parallel import tensor_part
from helix.partition import rivals
from helix.partition.grid import shard_range
from helix.partition.options import AttentionOptions
from helix.partition.transformer_cost import TransformerCost, expert_bytes


class TensorParallel(Method):
    """tp16, tp4_dp4; with `residual=sharded` tp16_sp, whose stream is cut over the sequence.

    Raises:
        PartitionError: if the layout does not fit the job; see `tensor_part`.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout)
        self.ranks = self.mesh()
        self.model: PlainTransformer = tensor_part(job, layout, self.ranks)
        self.sequence = layout.options.residual == "sharded"
        self.batch = job.batch // layout.data
        self.layers = rivals.stage_layers(job.shape.layers, layout.stage, self.ranks.stage.rank)
        self.first, self.last = self.model.embedding is not None, self.model.head is not None
        if layout.grid.ranks > 1:
            self.axes = name_tensor(self.ranks.device_mesh["head"])

    def own(self, tokens: Tensor) -> Tensor:
        """[B, ..] -> this replica's samples of it."""
        return tokens.chunk(self.layout.data)[self.ranks.data.rank]

    def step(self, tokens: Tensor) -> Tensor | None:
        return self.model(self.own(tokens))

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        whole = None if output is None else join_vocabulary(output, self.ranks, self.job.shape.vocab)
        return self.gather(whole if self.ranks.model.rank == 0 else None)

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        job, layout, rank, ranks = self.job, self.layout, self.ranks.model.rank, self.layout.grid.ranks
        microbatches = layout.microbatches if layout.stage > 1 else 1
        size = self.batch // microbatches
        layers = routes[self.layers.start : self.layers.stop]
        pieces = [piece for each in layers for piece in self.own(each).chunk(microbatches)]
        if self.sequence:
            pieces = [by_sequence(piece, size, ranks) for piece in pieces]
        capacities = self.capacities(pieces, ranks, rank)  # of each layer and microbatch
        out = rivals.tensor_bytes(self._cost(size), rank, capacities, self.first, self.last)
        exchanged = expert_bytes(job.shape, layout.ep_size, capacities, job.dtype.itemsize)
        for key in out.keys() - exchanged.keys():
            out[key] *= microbatches
        if not self.last:
            shard = job.length // ranks if self.sequence else job.length
            out["send/stage"] = self.batch * shard * job.shape.width * job.dtype.itemsize
        return +out

    def predicted_weight_bytes(self) -> int:
        shape, itemsize, rank = self.job.shape, self.job.dtype.itemsize, self.ranks.model.rank
        vocabulary = len(shard_range(shape.vocab, self.layout.grid.ranks, rank)) * shape.width * itemsize
        without = (0 if self.first else vocabulary) + (0 if self.last else vocabulary + shape.width * itemsize)
        return self._cost(1).weight_bytes(rank) - without

    def _cost(self, batch: int) -> TransformerCost:
        """Closed forms of a model with this stage's layers only: its ranks cut it as a 1 x n grid does."""
        job, layout = self.job, self.layout
        shape = replace(job.shape, layers=len(self.layers))
        options = AttentionOptions(schedule="heads", residual=layout.options.residual)
        return TransformerCost(shape, layout.grid, options, batch, job.length, job.dtype.itemsize, layout.ep_size)


def name_tensor(mesh: DeviceMesh) -> dict[str, str]:
    """`Method.axes` of a tensor parallel model: its group by name and by description.

    DTensor remembers layouts by meshes that are equal, and so may use the group of an equal mesh of another method.
    """
    group = mesh.get_group()
    return {group.group_name: "tensor", group.group_desc: "tensor"}


def by_sequence(tokens: Tensor, batch: int, ranks: int) -> Tensor:
    """tokens[B * T, ..] -> the same in the order of a stream cut over the sequence: T@ranks outermost."""
    return tokens.unflatten(0, (batch, ranks, -1)).movedim(1, 0).flatten(0, 2)


def join_vocabulary(logits: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """logits[B, T, V@head] -> [B * T, V] on every rank of the replica."""
    flat = logits.flatten(0, 1)
    if mesh.head.size == 1:
        return flat
    shape = torch.Size((flat.shape[0], vocab))
    line, cut = mesh.device_mesh["head"], [Shard(1)]
    return DTensor.from_local(flat, line, cut, run_check=False, shape=shape, stride=(vocab, 1)).full_tensor()
