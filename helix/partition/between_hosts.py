"""Closed forms for the bytes that cross from host to host in one forward pass of Helix.

Of each collective, by the ranks of its axis on each host. A rank sends each other rank of the axis an equal part of
its bytes, but for all-to-alls that deal samples or rows, of which a rank is sent what it will work on. So over gloo,
where every collective is one direct exchange; NCCL may send less between hosts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from helix.partition.schedules import deal_sizes, row_chunks
from helix.partition.transformer_cost import TransformerCost

# What the ranks of the slice axis, the head axis or an expert group do together; all else, all m * n.
_SLICE = ("qkv", "q", "kv", "qk", "out", "scores", "qk_norm", "concat_slices")
_OF_SLICES = {f"attention.{name}" for name in _SLICE}
_OF_HEADS = {"attention.concat_heads"}
_OF_EXPERTS = {"experts", "experts.capacity"}
_DEALT = {"attention.qkv", "attention.q"}

# Bytes by (sending host, receiving host).
Pairs = Counter[tuple[int, int]]


def between_hosts(
    cost: TransformerCost, hosts: Sequence[int], capacities: Sequence[Sequence[int]] | None = None
) -> dict[str, Pairs]:
    """Bytes that the ranks of one replica send to other hosts, by "collective/name".

    Args:
        hosts: of each of the replica's m * n ranks.
        capacities: of each rank, as `TransformerCost.bytes` takes them.
    """
    out: dict[str, Pairs] = {}
    for rank, own in enumerate(hosts):
        for key, nbytes in cost.bytes(rank, None if capacities is None else capacities[rank]).items():
            parts = _parts(cost, key.partition("/")[2], rank)
            whole = sum(parts.values())
            shares: Counter[int] = Counter()
            for other, part in parts.items():
                shares[hosts[other]] += part
            for host, share in shares.items():
                if host != own and share:
                    out.setdefault(key, Counter())[own, host] += nbytes * share // whole
    return out


def _parts(cost: TransformerCost, name: str, rank: int) -> dict[int, int]:
    """The other ranks of a collective, and what part of the rank's bytes each of them is sent."""
    m, ranks = cost.grid.m, cost.grid.ranks
    if name in _OF_SLICES:
        group = range(rank // m * m, (rank // m + 1) * m)
    elif name in _OF_HEADS:
        group = range(rank % m, ranks, m)
    elif name in _OF_EXPERTS:
        size = cost.ep_size
        group = range(rank // size * size, (rank // size + 1) * size)
    else:
        group = range(ranks)
    dealt = _dealt(cost) if name in _DEALT else [1] * len(group)
    return {other: part for other, part in zip(group, dealt, strict=True) if other != rank}


def _dealt(cost: TransformerCost) -> list[int]:
    """Samples, rows or shares of heads that each slice works on."""
    if cost.options.schedule == "batch":
        return deal_sizes(cost.batch, cost.grid.m)
    if cost.options.schedule == "rows":
        return [sum(map(len, chunks)) for chunks in row_chunks(cost.length, cost.grid.m, cost.shape.causal)]
    return [1] * cost.grid.m
