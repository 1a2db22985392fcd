"""Closed forms for the methods that Helix is measured against, from the same building blocks.

The keys are "collective/axis": another library's collectives have no names. Those of the experts, which are
Helix's in every method, keep theirs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from helix.partition.grid import PartitionError, divisors
from helix.partition.schedules import deal_sizes
from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import ROUTER_ITEMSIZE, TransformerCost


def check_tensor(shape: TransformerShape, ranks: int, length: int | None = None) -> None:
    """Check that every rank gets whole heads; tensor parallelism has no other way to cut attention.

    Args:
        length: tokens of a sequence, where the stream is cut over it.

    Raises:
        PartitionError: if the ranks divide not both the heads and the key/value heads, or not the length.
    """
    for name, count in (("heads", shape.heads), ("kv_heads", shape.kv_heads)):
        if count % ranks:
            legal = divisors(math.gcd(shape.heads, shape.kv_heads))
            raise PartitionError(
                f"tensor parallelism over {ranks} ranks needs whole heads, and {name} is {count}; legal: {legal}"
            )
    if length is not None and length % ranks:
        raise PartitionError(f"a stream cut over {ranks} ranks needs a length that they divide, not {length}")


def check_pipeline(shape: TransformerShape, stages: int, batch: int, microbatches: int) -> None:
    """Check that each stage has a layer, and each microbatch equally many of a replica's samples.

    Raises:
        PartitionError: with the legal numbers.
    """
    if shape.layers < stages:
        raise PartitionError(f"{stages} pipeline stages need as many layers, not {shape.layers}")
    if batch % microbatches:
        raise PartitionError(
            f"parallel.microbatches={microbatches} does not divide the {batch} samples of a replica; "
            f"legal: {divisors(batch)}"
        )


def check_replicas(batch: int, data: int) -> None:
    """Check that each of `data` replicas gets equally many samples.

    Raises:
        PartitionError: with the legal numbers.
    """
    if batch % data:
        raise PartitionError(f"{data} replicas cannot share {batch} samples evenly; legal: {divisors(batch)}")


def check_data(shape: TransformerShape, data: int, batch: int) -> None:
    """Check that replicas that share experts have equally many samples; without experts they need not.

    Raises:
        PartitionError: with the legal numbers.
    """
    if shape.experts:
        check_replicas(batch, data)


def tensor_bytes(
    cost: TransformerCost, rank: int, capacities: Sequence[int], first: bool = True, last: bool = True
) -> Counter[str]:
    """Bytes that `rank` sends in one forward pass of tensor parallelism over n ranks (a 1 x n grid of `cost`).

    Tensor parallelism moves what Helix on a 1 x n grid moves: with `residual=replicated` an all-reduce after the
    embedding and after each half block, with `sharded` its two halves.

    Args:
        capacities: see `TransformerCost.bytes`.
        first, last: whether this pipeline stage has the embedding, and the head.
    """
    out: Counter[str] = Counter()
    for key, nbytes in cost.bytes(rank, capacities).items():
        kind, name = key.split("/")
        if (name == "embedding.leave" and not first) or (name == "head.enter" and not last):
            continue
        out[key if name.startswith("experts") else f"{kind}/tensor"] += nbytes
    return out


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """The run of layers that a pipeline stage has: as even as can be."""
    sizes = deal_sizes(layers, stages)
    return range(sum(sizes[:stage]), sum(sizes[: stage + 1]))


def bubble(stages: int, microbatches: int) -> float:
    """Share of a forward step in which a stage of a GPipe pipeline waits: (p - 1) / (microbatches + p - 1).

    Source: Huang et al., "GPipe" (2019), section 2.3; with equally long stages.
    """
    return (stages - 1) / (microbatches + stages - 1)


def replica_weight_bytes(shape: TransformerShape, itemsize: int, ep_size: int = 1) -> int:
    """Bytes of a whole model's parameters on one rank, of which only the experts are spread, over `ep_size` ranks."""
    experts = shape.layers * shape.experts * shape.expert_parameters
    router = shape.layers * shape.experts * shape.width
    rest = shape.parameters() - experts - router
    return (rest + experts // ep_size) * itemsize + router * ROUTER_ITEMSIZE
