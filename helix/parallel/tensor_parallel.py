"""PyTorch's own tensor parallelism of the plain transformer, and its pipeline stages: measured, and trained.

The plans are those of PyTorch's tutorial ("Large Scale Transformer model training with Tensor Parallel"):
column-wise q, k, v, up and head, row-wise embedding, o and down. Written to be as fast as the library allows:
attention runs on local shards of whole heads, each block's input becomes a DTensor once, and the logits stay
cut over the vocabulary, as Helix leaves them.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
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
from helix.parallel.methods.method import Job, Layout
from helix.partition import rivals


def tensor_part(job: Job, layout: Layout, mesh: Mesh) -> PlainTransformer:
    """This rank's part of the job's model: its stage's layers, cut over the stage's n ranks.

    Returns:
        The part; tokens[B, T], or on a later stage the stream, -> the stream, or on the last stage
        logits[B, T, V@head]. The stream is x[B, T, E], or x[B, T@head, E] with `residual=sharded`.

    Raises:
        PartitionError: if the replicas divide not the batch, or the ranks not both the heads and the key/value
            heads, or not the length where the stream is cut; if there are fewer layers than stages, or the
            microbatches do not divide a replica's batch.
    """
    ranks, sequence = layout.grid.ranks, layout.options.residual == "sharded"
    rivals.check_replicas(job.batch, layout.data)
    rivals.check_tensor(job.shape, ranks, job.length if sequence else None)
    if layout.stage > 1:
        rivals.check_pipeline(job.shape, layout.stage, job.batch // layout.data, layout.microbatches)
    with job.device:
        experts = expert_layers(job, mesh, layout.ep_size, sequence)
        model = PlainTransformer(job.shape, job.dtype, experts)
        job.fill(model)
    model.keep_layers(rivals.stage_layers(job.shape.layers, layout.stage, mesh.stage.rank))
    return tensor_parallel(model, mesh.device_mesh["head"], sequence) if ranks > 1 else model


def tensor_parallel(model: PlainTransformer, mesh: DeviceMesh, sequence: bool = False) -> PlainTransformer:
    """Cut `model`, whose whole weights every rank holds, over a mesh of one axis; in place.

    Args:
        mesh: whose size divides both the heads and the key/value heads.
        sequence: whether the residual stream is cut over the sequence (`SequenceParallel`), which trades each
            all-reduce for a reduce-scatter and an all-gather. The mesh's size must then divide the length.

    Returns:
        The model; tokens[B, T] on every rank -> logits[B, T, V@ranks].
    """
    # Every rank has drawn the same weights: none needs to be sent.
    parallelize_module(model, mesh, _plan(model, sequence), src_data_rank=None)
    return model


def _plan(model: PlainTransformer, sequence: bool) -> dict[str, ParallelStyle]:
    """The style of each part that the model has: a pipeline's stage lacks some, and experts are cut already."""
    stream = Shard(1) if sequence else Replicate()
    plan = _attention(stream) | _norms(model, sequence)
    if not model.shape.experts:
        plan |= {
            "blocks.*.mlp": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
            "blocks.*.mlp.up": ColwiseParallel(),
            "blocks.*.mlp.down": RowwiseParallel(output_layouts=stream),
        }
    if model.embedding is not None:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    if model.head is not None:
        plan["head"] = ColwiseParallel(input_layouts=stream)
    return plan


def _attention(stream: Placement) -> dict[str, ParallelStyle]:
    return {
        "blocks.*.attention": PrepareModuleInput(
            input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)
        ),
        "blocks.*.attention.q": ColwiseParallel(),
        "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(),
        "blocks.*.attention.o": RowwiseParallel(output_layouts=stream),
    }


def _norms(model: PlainTransformer, sequence: bool) -> dict[str, ParallelStyle]:
    """Norms of something that is cut: their weights' gradients are then summed over the ranks."""
    plan: dict[str, ParallelStyle] = {}
    if sequence:
        for name in ("blocks.*.attention_norm", "blocks.*.mlp_norm", *(["norm"] if model.norm is not None else [])):
            plan[name] = SequenceParallel(use_local_output=True)
    if model.shape.qk_norm:
        for name in ("blocks.*.attention.q_norm", "blocks.*.attention.k_norm"):
            # q[B, T, H@ranks, D]
            plan[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan
