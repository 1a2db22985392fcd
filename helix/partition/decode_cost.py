"""Closed forms for one decoding step: a token of each sample against a cache of keys and values.

Letters as in `helix.partition.grid`; p = m * n. The weights are cut as in prefill. Projections gather whole heads of
the head group inside the m-group; the cache is cut over the m-group by tokens, samples or key/value heads; one
exchange leaves each rank its slice of the output; the stream is whole on every rank, so both half blocks end in a sum
over p.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from helix.partition import wire
from helix.partition.grid import Grid, HeadLayout, PartitionError, shard_range
from helix.partition.shape import TransformerShape

# How the cache is cut over the m-group, in order of preference where two cost the same.
CACHES = ("heads", "batch", "kvseq")
PARTIAL_ITEMSIZE = 4  # partial outputs and their log-sum-exps are merged in fp32


def refusal(cache: str, layout: HeadLayout, grid: Grid, batch: int) -> str | None:
    """Why the cache cannot be cut so, or None if it can."""
    if cache not in CACHES:
        return f"there is no way {cache!r} to cut a cache; legal: {', '.join(CACHES)}"
    if cache == "batch" and batch < grid.m:
        return f"it deals samples to m={grid.m} ranks, and the batch has {batch}"
    if cache == "heads" and (layout.kv_heads // grid.n) % grid.m:
        return f"it deals whole heads to m={grid.m} ranks, and the group has {layout.kv_heads // grid.n} kv_heads"
    return None


@dataclass(frozen=True)
class DecodeCost:
    """What one decoding step costs one rank.

    Args:
        shape, grid: the model and its partition.
        cache: how the cache is cut over the m-group; of no matter where m = 1.
        batch: samples of one data replica.
        context: tokens in the cache, the new one included.
        itemsize: bytes of one number.
        sharers: neighbouring ranks that hold the same key/value head and share its tokens out among them, as vLLM's
            decode context parallelism does on more ranks than key/value heads; `shape` counts a head once for each
            rank that holds it. For m = 1 only.

    Raises:
        PartitionError: if the cache cannot be cut so.
    """

    shape: TransformerShape
    grid: Grid
    cache: str
    batch: int
    context: int
    itemsize: int
    sharers: int = 1

    def __post_init__(self) -> None:
        reason = refusal(self.cache, self.shape.layout, self.grid, self.batch)
        if reason is not None:
            raise PartitionError(f"cache={self.cache} cannot run on {self.grid.name}: {reason}")

    def layer_bytes(self) -> Counter[str]:
        """Bytes that one rank sends in one layer, by "collective/name", without its experts."""
        shape, m = self.shape, self.grid.m
        out = Counter({"all_reduce/attention.leave": self._sum(), "all_reduce/mlp.leave": self._sum()})
        if m > 1:
            heads, slice_dim = shape.heads // self.grid.n, shape.head_dim // m
            kv_heads = shape.kv_heads // self.grid.n
            projected = self.batch * (heads + 2 * kv_heads) * slice_dim
            out["all_gather/attention.qkv"] = wire.all_gather(projected, m, self.itemsize)
            rows = self.batch * heads
            if self.cache == "kvseq":
                share = rows * (slice_dim + 2)  # with the scores' maximum and the weights' sum
                out["all_to_all/attention.merge"] = wire.all_to_all(m * share, share, PARTIAL_ITEMSIZE)
            else:
                own = -(-rows // m) * slice_dim
                out["all_to_all/attention.merge"] = wire.all_to_all(m * own, own, self.itemsize)
        if self.sharers > 1:
            rows = self.batch * shape.heads // self.grid.n  # of queries that every sharer asks its tokens
            share = rows * (shape.head_dim + 2)
            out["all_gather/attention.q"] = wire.all_gather(rows * shape.head_dim, self.sharers, self.itemsize)
            merged = wire.all_to_all(self.sharers * share, share, PARTIAL_ITEMSIZE)
            out["all_to_all/attention.merge"] = merged
        return +out

    def end_bytes(self) -> Counter[str]:
        """Bytes of the embedding's sum and of the logits' gather."""
        vocab = self.batch * -(-self.shape.vocab // self.grid.ranks)
        gathered = wire.all_gather(vocab, self.grid.ranks, self.itemsize)
        return +Counter({"all_reduce/embedding.leave": self._sum(), "all_gather/head.logits": gathered})

    def bytes(self) -> Counter[str]:
        """Bytes that one rank sends in a step, by "collective/name", without its experts."""
        out = self.end_bytes()
        for key, nbytes in self.layer_bytes().items():
            out[key] += self.shape.layers * nbytes
        return out

    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one layer on the fullest rank, which a step reads."""
        samples, tokens, heads = self.batch, -(-self.context // self.sharers), self.shape.kv_heads // self.grid.n
        m = self.grid.m
        if self.cache == "kvseq":
            tokens = len(shard_range(tokens, m, 0))
        elif self.cache == "batch":
            samples = -(-samples // m)
        else:
            heads //= m
        return 2 * samples * tokens * heads * self.shape.head_dim * self.itemsize

    def core_flops(self) -> int:
        """FLOPs of one layer's Q K^T and P V on the fullest rank: each cached number meets its group's queries."""
        return self.cache_bytes() // self.itemsize * 2 * self.shape.layout.queries_per_kv * self.sharers

    def _sum(self) -> int:
        return wire.all_reduce(self.batch * self.shape.width, self.grid.ranks, self.itemsize)
