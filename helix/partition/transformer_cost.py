"""Closed forms for the whole transformer: bytes per collective, weights, activations and FLOPs of one rank, forward.

Sums of `AttentionCost` and of what the residual stream moves in and out of each block. Letters as in
`helix.partition.grid`; p = m * n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from helix.partition import wire
from helix.partition.cost import AttentionCost
from helix.partition.grid import Grid, shard_range
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

ROUTER_ITEMSIZE = 4  # DeepSpeed routes in fp32
CAPACITY_ITEMSIZE = 8  # and agrees on the fullest expert's count as one int64


@dataclass(frozen=True)
class TransformerCost:
    """What one forward pass of a model costs one rank of a replica.

    Args:
        shape, grid: the model and its partition.
        options: with a schedule that is resolved, not "auto".
        batch, length: B and T of one data replica.
        itemsize: bytes of one number.
        ep_size: ranks that share one set of experts.
    """

    shape: TransformerShape
    grid: Grid
    options: AttentionOptions
    batch: int
    length: int
    itemsize: int
    ep_size: int = 1

    @property
    def attention(self) -> AttentionCost:
        return AttentionCost(
            self.shape.layout,
            self.grid,
            self.options.schedule,
            self.batch,
            self.length,
            self.shape.causal,
            self.itemsize,
        )

    @property
    def _tokens(self) -> int:
        return self.batch * self.length

    @property
    def tokens_per_shard(self) -> int:
        """ceil(N / p): rows of a token-sharded stream, the last shard's padding included."""
        return -(-self._tokens // self.grid.ranks)

    def bytes(self, rank: int, capacities: Sequence[int] | None = None) -> Counter[str]:
        """Bytes that `rank` sends, by "collective/name" as `helix.comm.record` counts them.

        Args:
            rank: rank within the replica's m * n.
            capacities: for each layer, the rows of the fullest expert in this rank's expert group
                (`expert_capacity`); needed with experts, whose exchange depends on the routing.
        """
        layers = self.shape.layers
        _, feature_slice = self.grid.coordinates(rank)
        out = self._leave("embedding") + self._enter("head")
        block = self._enter("attention") + self.attention.bytes(feature_slice, self.shape.qk_norm)
        block += self._concat() if self.options.aggregate == "concat" else self._leave("attention")
        if self.shape.dense_hidden:
            block += self._enter("mlp") + self._leave("mlp")
        for key, nbytes in block.items():
            out[key] += layers * nbytes
        if self.shape.experts:
            out += self._experts(capacities or [])
        return +out

    def _enter(self, name: str) -> Counter[str]:
        if self.options.residual == "replicated" or self.grid.ranks == 1:
            return Counter()
        shard = self.tokens_per_shard * self.shape.width
        return Counter({f"all_gather/{name}.enter": wire.all_gather(shard, self.grid.ranks, self.itemsize)})

    def _leave(self, name: str) -> Counter[str]:
        p, width = self.grid.ranks, self.shape.width
        if p == 1:
            return Counter()
        if self.options.residual == "replicated":
            return Counter({f"all_reduce/{name}.leave": wire.all_reduce(self._tokens * width, p, self.itemsize)})
        padded = self.tokens_per_shard * p * width
        return Counter({f"reduce_scatter/{name}.leave": wire.reduce_scatter(padded, p, self.itemsize)})

    def _concat(self) -> Counter[str]:
        m, n = self.grid.m, self.grid.n
        own = self._tokens * self.shape.attention_width // self.grid.ranks
        if self.options.concat == "flat":
            return Counter({"all_gather/attention.concat": wire.all_gather(own, m * n, self.itemsize)})
        return Counter(
            {
                "all_gather/attention.concat_slices": wire.all_gather(own, m, self.itemsize),
                "all_gather/attention.concat_heads": wire.all_gather(own * m, n, self.itemsize),
            }
        )

    def _experts(self, capacities: Sequence[int]) -> Counter[str]:
        out = expert_bytes(self.shape, self.ep_size, capacities, self.itemsize)
        if self.options.residual == "replicated" and self.grid.ranks > 1:
            shard = self.tokens_per_shard * self.shape.width
            gathered = wire.all_gather(shard, self.grid.ranks, self.itemsize)
            out["all_gather/experts.finish"] = self.shape.layers * gathered
        return out

    def weight_bytes(self, rank: int) -> int:
        """Bytes of the parameters that `rank` holds."""
        shape, p, width = self.shape, self.grid.ranks, self.shape.width
        columns = width // p if self.options.projection == "block" else width
        attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // p * columns
        if self.options.aggregate == "project":
            attention += shape.attention_width // p * width
        if shape.qk_norm:
            attention += 2 * shape.head_dim // self.grid.m
        mlp = shape.mlp_matrices * width * self._share(shape.dense_hidden, rank)
        mlp += shape.experts // self.ep_size * shape.expert_parameters
        ends = width + shape.vocab_matrices * self._share(shape.vocab, rank) * width
        numbers = shape.layers * (attention + mlp + 2 * width) + ends
        return numbers * self.itemsize + shape.layers * shape.experts * width * ROUTER_ITEMSIZE

    def activation_bytes(self) -> int:
        """Estimate of the bytes that one rank holds at once in a forward pass: the most of any of its steps.

        Of the stream, S numbers a token on this rank (E / p where it is cut), a block holds its input, and what the
        half block before it and the norm made; G = E where it was gathered. Counts tensors, one buffer for what a
        collective returns, no allocator's slack and no library's own buffers.
        """
        shape, p, width = self.shape, self.grid.ranks, self.shape.width
        whole = self.options.residual == "replicated" or p == 1
        stream = width if whole else -(-width // p)
        gathered = 0 if whole else width
        hidden = shape.dense_hidden // p + (2 * shape.top_k * shape.mlp_hidden // p if shape.experts else 0)
        steps = (
            2 * stream + gathered + self._attention_numbers(),
            3 * stream + gathered + max(2 * hidden, hidden + width),
            2 * stream + gathered + shape.vocab // p,
        )
        return max(steps) * self._tokens * self.itemsize + self._score_bytes()

    def _attention_numbers(self) -> int:
        """Numbers of a token that attention holds at once beside the stream.

        Its own queries, keys and values, P = (H + 2 K) D / p: rotated (3 P, less the values), or dealt, as they came
        and as they lie together then (3 P); of `rows` the group's keys and values twice, of `gather` its queries and
        keys. After the core, P and the output beside the partial sum that leaves (E, twice where the stream is whole).
        """
        shape, grid = self.shape, self.grid
        feature = shape.head_dim // grid.m
        queries, keys = shape.heads // grid.n * feature, shape.kv_heads // grid.n * feature
        packed = queries + 2 * keys
        turned = 2 * packed + queries + keys if shape.rope else packed
        moved = {
            "perslice": packed + queries,
            "rows": packed + 2 * queries + 4 * keys * grid.m,
            "gather": packed + 2 * (queries + keys) * grid.m,
            "score": packed + queries,
        }.get(self.options.schedule, 3 * packed)
        if grid.m == 1:
            moved = packed + queries
        left = shape.width * (2 if self.options.residual == "replicated" and grid.ranks > 1 else 1)
        return max(turned, moved, packed + queries + left)

    def _score_bytes(self) -> int:
        """Of attention that is no fused kernel: [B, H/n, T, S], in fp32 for its softmax.

        Held at once as they are before and after the mask, of `score` also as they were before they were scaled.
        """
        copies = {"gather": 2, "score": 3}.get(self.options.schedule, 0) if self.grid.m > 1 else 0
        return copies * self._tokens * self.length * self.shape.heads // self.grid.n * max(4, self.itemsize)

    def saved_bytes(self, regather: bool = False) -> int:
        """Estimate of the bytes that one rank keeps of all layers for the backward pass, without recomputation.

        Of each token and layer what the two half blocks gather of the stream (2 E), and stream and norms (4 E), which
        a sharded stream cuts over ranks; the head group's queries to output (4 H D / n); the MLP's hidden before and
        after its activation, cut over ranks; and the logits with their softmax.

        Args:
            regather: whether the backward pass gathers the stream again, so that its shard is enough.
        """
        shape, p = self.shape, self.grid.ranks
        shards = 1 if self.options.residual == "replicated" else p
        hidden = shape.dense_hidden + (shape.top_k * shape.mlp_hidden if shape.experts else 0)
        layer = (2 * shape.width) // (shards if regather else 1) + 4 * shape.width // shards
        layer += 4 * shape.attention_width // self.grid.n + shape.mlp_matrices * hidden // p
        return self._tokens * (shape.layers * layer + 3 * shape.vocab // p) * self.itemsize

    def flops(self, rank: int) -> int:
        """FLOPs of the matrix products on `rank` (busiest of its m-group in the core attention)."""
        shape, tokens, width = self.shape, self._tokens, self.shape.width
        columns = width // self.grid.ranks if self.options.projection == "block" else width
        projections = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // self.grid.ranks * columns
        if self.options.aggregate == "project":
            projections += shape.attention_width // self.grid.ranks * width
        mlp = 2 * tokens * shape.mlp_matrices * width * self._share(shape.dense_hidden, rank)
        if shape.experts:
            mlp += 2 * self.tokens_per_shard * shape.top_k * shape.expert_parameters  # on average
        head = 2 * tokens * width * self._share(shape.vocab, rank)
        return shape.layers * (2 * tokens * projections + self.attention.core_flops() + mlp) + head

    def _share(self, count: int, rank: int) -> int:
        return len(shard_range(count, self.grid.ranks, rank))


def expert_bytes(shape: TransformerShape, ep_size: int, capacities: Sequence[int], itemsize: int) -> Counter[str]:
    """Bytes of the experts' dispatch and return, and of the agreement on their size, over all of `capacities`."""
    out: Counter[str] = Counter()
    if ep_size > 1:
        own = shape.experts // ep_size * shape.width * itemsize
        out["all_to_all/experts"] = sum(2 * (ep_size - 1) * capacity * own for capacity in capacities)
        out["all_reduce/experts.capacity"] = len(capacities) * wire.all_reduce(1, ep_size, CAPACITY_ITEMSIZE)
    return out


def expert_capacity(
    routes: Iterable[Sequence[int]], experts: int, ranks: int, ep_size: int, tokens_per_shard: int
) -> list[int]:
    """Rows of the fullest expert in each expert group of a replica, from where each token goes.

    Args:
        routes: for each token, in order, the experts it is sent to.
        experts: number of experts.
        ranks: m * n; ranks g * ep_size to (g + 1) * ep_size - 1 are group g.
        ep_size: ranks of a group.
        tokens_per_shard: tokens of each rank. The padding of the last shards is routed as well: a row of
            zeros has equal logits everywhere and goes to the first experts.

    Returns:
        One figure for each group: the most rows that any of its ranks sends to any one expert.
    """
    rows = list(routes)
    top_k = len(rows[0])
    rows += [tuple(range(top_k))] * (ranks * tokens_per_shard - len(rows))
    fullest = []
    for rank in range(ranks):
        shard = rows[rank * tokens_per_shard : (rank + 1) * tokens_per_shard]
        counts = Counter(expert for token in shard for expert in token)
        fullest.append(max(counts.values()))
    return [max(fullest[g : g + ep_size]) for g in range(0, ranks, ep_size)]
