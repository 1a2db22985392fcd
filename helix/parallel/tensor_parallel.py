"""PyTorch's own tensor parallelism on the plain transformer: the peer that Helix is measured against.

The plans are those of PyTorch's tutorial ("Large Scale Transformer model training with Tensor Parallel"):
column-wise q, k, v, up and head, row-wise embedding, o and down. Written to be as fast as the library allows:
attention runs on local shards of whole heads, each block's input becomes a DTensor once, and the logits stay
cut over the vocabulary, as Helix leaves them.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from helix.models.plain import PlainTransformer
from helix.partition.grid import PartitionError
from helix.partition.shape import TransformerShape


def check_tensor_parallel(shape: TransformerShape, ranks: int) -> None:
    """Check that every rank gets whole heads; tensor parallelism has no other way to cut attention.

    Raises:
        PartitionError: if the ranks divide not both the heads and the key/value heads.
    """
    for name, count in (("heads", shape.heads), ("kv_heads", shape.kv_heads)):
        if count % ranks:
            raise PartitionError(f"tensor parallelism over {ranks} ranks needs whole heads, and {name} is {count}")


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
    check_tensor_parallel(model.shape, mesh.size())
    # Every rank has drawn the same weights: none needs to be sent.
    parallelize_module(model, mesh, _plan(sequence, model.shape.qk_norm), src_data_rank=None)
    return model


def _plan(sequence: bool, qk_norm: bool) -> dict[str, ParallelStyle]:
    stream = Shard(1) if sequence else Replicate()
    norms: dict[str, ParallelStyle] = {}
    if sequence:
        for name in ("blocks.*.attention_norm", "blocks.*.mlp_norm", "norm"):
            norms[name] = SequenceParallel(use_local_output=True)
    if qk_norm:  # q[B, T, H@ranks, D]: cut over the heads, so that the weight's gradient is summed over them
        for name in ("blocks.*.attention.q_norm", "blocks.*.attention.k_norm"):
            norms[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return norms | {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "blocks.*.attention": PrepareModuleInput(
            input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)
        ),
        "blocks.*.attention.q": ColwiseParallel(),
        "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(),
        "blocks.*.attention.o": RowwiseParallel(output_layouts=stream),
        "blocks.*.mlp": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=stream),
        "head": ColwiseParallel(input_layouts=stream),
    }
