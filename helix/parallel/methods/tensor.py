"""PyTorch's own tensor parallelism on the plain transformer, and data replicas of it.

The plans are those of PyTorch's tutorial ("Large Scale Transformer model training with Tensor Parallel"):
column-wise q, k, v, up and head, row-wise embedding, o and down. Written to be as fast as the library allows:
attention runs on local shards of whole heads, each block's input becomes a DTensor once, and the logits stay
cut over the vocabulary, as Helix leaves them.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from helix.comm.mesh import Mesh
from helix.models.plain import PlainTransformer
from helix.parallel.methods.experts import expert_layers
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition import rivals
from helix.partition.options import AttentionOptions
from helix.partition.transformer_cost import TransformerCost


class TensorParallel(Method):
    """tp16, tp4_dp4; with `residual=sharded` tp16_sp, whose stream is cut over the sequence.

    Raises:
        PartitionError: if the ranks divide not both the heads and the key/value heads, or not the length where the
            stream is cut.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout)
        ranks, self.sequence = layout.grid.ranks, layout.options.residual == "sharded"
        rivals.check_replicas(job.batch, layout.data)
        rivals.check_tensor(job.shape, ranks, job.length if self.sequence else None)
        self.ranks = self.mesh()
        with job.device:
            experts = expert_layers(job, self.ranks, layout.ep_size, self.sequence)
            self.model: PlainTransformer = PlainTransformer(job.shape, job.dtype, experts)
            self.model.init_weights(job.seed)
        if ranks > 1:
            tensor = self.ranks.device_mesh["head"]
            tensor_parallel(self.model, tensor, self.sequence)
            self.axes = name_tensor(tensor)

    def step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.chunk(self.layout.data)[self.ranks.data.rank])

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        assert output is not None
        whole = join_vocabulary(output, self.ranks, self.job.shape.vocab)
        return self.gather(whole if self.ranks.model.rank == 0 else None)

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        job, layout, rank = self.job, self.layout, self.ranks.model.rank
        batch = job.batch // layout.data
        own = [each.chunk(layout.data)[self.ranks.data.rank] for each in routes]
        if self.sequence:
            own = [by_sequence(each, batch, layout.grid.ranks) for each in own]
        cost = tensor_cost(job, layout, batch)
        return rivals.tensor_bytes(cost, rank, self.capacities(own, layout.grid.ranks, rank))

    def predicted_weight_bytes(self) -> int:
        return tensor_cost(self.job, self.layout, 1).weight_bytes(self.ranks.model.rank)


def name_tensor(mesh: DeviceMesh) -> dict[str, str]:
    """`Method.axes` of a tensor parallel model: its group by name and by description.

    DTensor remembers layouts by meshes that are equal, and so may use the group of an equal mesh of another method.
    """
    group = mesh.get_group()
    return {group.group_name: "tensor", group.group_desc: "tensor"}


def tensor_cost(job: Job, layout: Layout, batch: int) -> TransformerCost:
    """Closed forms of one replica: tensor parallelism cuts the model as a 1 x n grid does."""
    options = AttentionOptions(schedule="heads", residual=layout.options.residual)
    return TransformerCost(job.shape, layout.grid, options, batch, job.length, job.dtype.itemsize, layout.ep_size)


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


def tensor_parallel(model: PlainTransformer, mesh: DeviceMesh, sequence: bool = False) -> PlainTransformer:
    """Cut `model`, whose whole weights every rank holds, over a mesh of one axis; in place.

    Args:
        sequence: whether the residual stream is cut over the sequence (`SequenceParallel`), which trades each
            all-reduce for a reduce-scatter and an all-gather. The mesh's size must then divide the length.

    Returns:
        The model; tokens[B, T] on every rank -> logits[B, T, V@ranks].

    Raises:
        PartitionError: if the mesh's size divides not both the heads and the key/value heads.
    """
    rivals.check_tensor(model.shape, mesh.size())
    # Every rank has drawn the same weights: none needs to be sent.
    parallelize_module(model, mesh, _plan(model, sequence), src_data_rank=None)
    return model


def _plan(model: PlainTransformer, sequence: bool) -> dict[str, ParallelStyle]:
    """The style of each part that the model has: a pipeline's stage lacks some, and experts are cut already."""
    stream = Shard(1) if sequence else Replicate()
    norms: dict[str, ParallelStyle] = {}
    if sequence:
        for name in ("blocks.*.attention_norm", "blocks.*.mlp_norm", *(["norm"] if model.norm is not None else [])):
            norms[name] = SequenceParallel(use_local_output=True)
    if (
        model.shape.qk_norm
    ):  # q[B, T, H@ranks, D]: cut over the heads, so that the weight's gradient is summed over them
        for name in ("blocks.*.attention.q_norm", "blocks.*.attention.k_norm"):
            norms[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
    ends: dict[str, ParallelStyle] = {}
    if model.embedding is not None:
        ends["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    if model.head is not None:
        ends["head"] = ColwiseParallel(input_layouts=stream)
    mlp: dict[str, ParallelStyle] = {}
    if not model.shape.experts:
        mlp = {
            "blocks.*.mlp": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
            "blocks.*.mlp.up": ColwiseParallel(),
            "blocks.*.mlp.down": RowwiseParallel(output_layouts=stream),
        }
    attention: dict[str, ParallelStyle] = {
        "blocks.*.attention": PrepareModuleInput(
            input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)
        ),
        "blocks.*.attention.q": ColwiseParallel(),
        "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(),
        "blocks.*.attention.o": RowwiseParallel(output_layouts=stream),
    }
    return norms | ends | attention | mlp
