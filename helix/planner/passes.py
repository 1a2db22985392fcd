"""Time of one layer and of a model's ends, in a pass over whole sequences.

A roofline of each operation (`Machine.matmul` and the others) on the bytes and FLOPs of `helix.partition`'s closed
forms, one after the other: nothing is hidden behind anything, except a context-parallel ring behind its own attention.
Letters as in `helix.partition.grid`; p = m * n; e bytes a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import TransformerCost
from helix.planner.layout import Layout
from helix.planner.machine import Machine
from helix.planner.routing import expected_fullest
from helix.planner.seconds import Seconds

# Times that unfused attention reads or writes each score: written, read and written by the softmax, the same by the
# dropout, and read by P V.
SCORE_PASSES = 6


@dataclass(frozen=True)
class LayerTime:
    """One layer's forward pass, and the parts of it that selective recomputation does again.

    Args:
        forward: all of it.
        core: the core attention.
        gather: what the layer gathers of the stream.
    """

    forward: Seconds
    core: Seconds
    gather: Seconds


@dataclass(frozen=True)
class Passes:
    """Times of passes of one model on one machine.

    Args:
        shape, machine: the model and the devices.
        itemsize: bytes of one number in the stream.
        commonest: the commonest token's part of all tokens; see `expected_fullest`.
    """

    shape: TransformerShape
    machine: Machine
    itemsize: int
    commonest: float = 0.0

    def layer(self, layout: Layout, batch: int, length: int, ep_size: int) -> LayerTime:
        """A layer's pass over batch x length tokens of one replica's stage."""
        if layout.tokens > 1:
            return self._by_tokens(layout, batch, length)
        cost = self.cost_of(layout, batch, length, ep_size)
        core = self.core(layout, cost)
        moved = cost.bytes(0, [self._capacity(cost.tokens_per_shard)])
        gather = sum(self._exchange(layout, key, moved[key], ep_size) for key in moved if key.endswith(".enter"))
        gather -= self._exchange(layout, "all_gather/head.enter", moved["all_gather/head.enter"], ep_size)
        ends = {"all_gather/head.enter"} | {key for key in moved if "/embedding." in key}
        exchange = sum(self._exchange(layout, key, count, ep_size) for key, count in moved.items() if key not in ends)
        dispatch = self.machine.dispatch() if layout.method == "tensor" and layout.grid.ranks > 1 else 0.0
        forward = core + self.dense(cost, batch * length) + Seconds(exchange=exchange, dispatch=dispatch)
        return LayerTime(forward + self._experts(cost), core, Seconds(exchange=gather))

    def ends(self, layout: Layout, batch: int, length: int, ep_size: int) -> Seconds:
        """Embedding and head of a pass, with the loss's or the sampler's reading of the logits."""
        length = -(-length // layout.tokens)
        cost = self.cost_of(layout, batch, length, ep_size)
        moved = cost.bytes(0, [0])
        keys = [key for key in moved if key.split("/")[1] in ("embedding.leave", "head.enter")]
        exchange = sum(self._exchange(layout, key, moved[key], ep_size) for key in keys)
        return self.head(batch * length, -(-self.shape.vocab // layout.grid.ranks)) + Seconds(exchange=exchange)

    def sent_bytes(self, layout: Layout, batch: int, length: int, ep_size: int) -> int:
        """Bytes that one rank sends in one layer of a pass; of Helix and tensor parallelism."""
        cost = self.cost_of(layout, batch, length, ep_size)
        moved = cost.bytes(0, [self._capacity(cost.tokens_per_shard)])
        return sum(count for key, count in moved.items() if "/embedding." not in key and "/head." not in key)

    def flops(self, layout: Layout, batch: int, length: int, ep_size: int = 1) -> int:
        """FLOPs of the matrix products of a whole pass on one rank."""
        cost = self.cost_of(layout, batch, length, ep_size)
        return replace(cost, shape=replace(cost.shape, layers=self.shape.layers)).flops(0)

    def optimizer(self, parameters: float, itemsize: int) -> Seconds:
        """AdamW's step: parameter, gradient and two moments are read, and all but the gradient written.

        Args:
            itemsize: bytes of each of these numbers.
        """
        return Seconds(memory=self.machine.stream((4 + 3) * parameters * itemsize))

    def kept(self, layout: Layout) -> TransformerShape:
        """The shape with key/value heads counted as often as tensor parallelism holds them."""
        if layout.kv_copies == 1:
            return self.shape
        return replace(self.shape, kv_heads=self.shape.kv_heads * layout.kv_copies)

    def cost_of(self, layout: Layout, batch: int, length: int, ep_size: int) -> TransformerCost:
        shape = replace(self.kept(layout), layers=1)
        return TransformerCost(shape, layout.grid, layout.options, batch, length, self.itemsize, ep_size)

    def product(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of [rows, inner] x [inner, columns]."""
        if not rows * inner * columns:
            return 0.0
        nbytes = (rows * inner + inner * columns + rows * columns) * self.itemsize
        return self.machine.matmul(2 * rows * inner * columns, nbytes, min(rows, inner, columns))

    def _mlp(self, rows: float, hidden: float) -> float:
        up = self.product(rows, self.shape.width, hidden * (self.shape.mlp_matrices - 1))
        return up + self.product(rows, hidden, self.shape.width)

    def core(self, layout: Layout, cost: TransformerCost) -> Seconds:
        """The core attention on the busiest rank of the m-group."""
        shape, p, tokens = cost.shape, layout.grid.ranks, cost.batch * cost.length
        flops, slice_dim = cost.attention.core_flops(), shape.head_dim // layout.m
        nbytes = 2 * tokens * (shape.heads + shape.kv_heads) * shape.head_dim / p * self.itemsize
        if layout.fused and layout.prefill not in ("gather", "score"):
            head_dim = slice_dim if layout.prefill == "perslice" else shape.head_dim
            return Seconds(attention=self.machine.attention(flops, nbytes, head_dim, cost.length))
        pairs = tokens * cost.length * shape.heads / layout.n
        if layout.prefill == "gather":  # forms the masked scores too
            flops = round(2 * pairs * (shape.head_dim + slice_dim))
        products = self.machine.matmul(flops, nbytes, slice_dim) + self.machine.kernel_s  # two of them
        return Seconds(attention=products + self.machine.scores(pairs * SCORE_PASSES * self.itemsize))

    def dense(self, cost: TransformerCost, tokens: int) -> Seconds:
        """Projections, the dense MLP, norms, residuals, positions and activation of one layer."""
        shape, p, e, stream = cost.shape, cost.grid.ranks, self.itemsize, self.machine.stream
        group, hidden = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // p, -(-shape.dense_hidden // p)
        matmul = self.product(tokens, shape.width, group) + self.product(
            tokens, shape.attention_width // p, shape.width
        )
        matmul += self._mlp(tokens, hidden)
        own = tokens if cost.options.residual == "replicated" else -(-tokens // p)
        memory = 2 * stream(2 * own * shape.width * e) + 2 * stream(3 * own * shape.width * e)
        if shape.rope:
            memory += stream(2 * tokens * (shape.heads + shape.kv_heads) * shape.head_dim / p * e)
        if hidden:
            memory += stream(tokens * hidden * shape.mlp_matrices * e)
        return Seconds(matmul=matmul, memory=memory)

    def _capacity(self, tokens: int) -> int:
        """Rows of the fullest expert that one rank sends to."""
        shape = self.shape
        rows = expected_fullest(tokens * shape.top_k, shape.experts, self.commonest)
        return max(1, round(rows)) if shape.experts else 0

    def _experts(self, cost: TransformerCost) -> Seconds:
        """A rank's experts on what the ranks of its expert group send, each padded to the fullest."""
        shape = cost.shape
        if not shape.experts:
            return Seconds()
        own, rows = shape.experts // cost.ep_size, cost.ep_size * self._capacity(cost.tokens_per_shard)
        route = self.product(cost.tokens_per_shard, shape.width, shape.experts)
        activation = self.machine.stream(own * rows * shape.mlp_hidden * shape.mlp_matrices * self.itemsize)
        # Tokens are put into a buffer of all experts, and taken out of it.
        placed = 2 * self.machine.stream(2 * own * rows * shape.width * self.itemsize)
        each = self._mlp(rows, shape.mlp_hidden) - 2 * self.machine.kernel_s  # one grouped product, not one an expert
        return Seconds(matmul=own * each + 2 * self.machine.kernel_s + route, memory=activation + placed)

    def head(self, tokens: int, vocab: int) -> Seconds:
        logits = self.machine.stream(2 * tokens * vocab * self.itemsize)
        return Seconds(matmul=self.product(tokens, self.shape.width, vocab), memory=logits)

    def _exchange(self, layout: Layout, key: str, nbytes: int, ep_size: int) -> float:
        """Seconds of the collective that a counter's key stands for."""
        kind, name = key.split("/")
        if name in ("experts", "experts.capacity"):
            size = ep_size
        elif name.startswith("attention.") and name not in ("attention.enter", "attention.leave"):
            size = layout.m
        else:
            size = layout.grid.ranks
        library = layout.method == "tensor" or name.startswith("experts")  # DTensor's, DeepSpeed's
        return self.machine.collective(kind, nbytes, size, library=library)

    def _by_tokens(self, layout: Layout, batch: int, length: int) -> LayerTime:
        """A layer whose tokens are cut over c ranks, and whose heads over n in each."""
        shape, c, e = self.shape, layout.tokens, self.itemsize
        whole = self.cost_of(layout.at(tokens=1), batch, length, 1)
        part = replace(whole, length=-(-length // c))
        tokens = batch * part.length
        key_value = 2 * shape.kv_heads * shape.head_dim // layout.n
        numbers = tokens * (2 * shape.attention_width // layout.n + key_value)
        core = Seconds(attention=self.machine.attention(whole.attention.core_flops() / c, numbers * e))
        moved = part.bytes(0)
        inside = {key: count for key, count in moved.items() if "/embedding." not in key and "/head." not in key}
        exchange = sum(self._exchange(layout, key, count, 1) for key, count in inside.items())
        if layout.method == "ulysses":
            kept = max(shape.kv_heads, c)  # key/value heads fewer than ranks are sent more than once
            each = tokens * shape.head_dim * e * (c - 1) // c
            exchange += self.machine.collective("all_to_all", each * (shape.heads + 2 * kept), c)
            exchange += self.machine.collective("all_to_all", each * shape.heads, c)
        else:
            shard = tokens * key_value * e
            turn = max(self.machine.send(shard, distance * layout.n) for distance in (1, c - 1))
            # In a ring the next keys and values arrive while attention to the present ones is computed.
            ring = max(0.0, (c - 1) * turn - core.attention * (c - 1) / c)
            exchange += min(ring, self.machine.collective("all_gather", (c - 1) * shard, c, layout.n))
        gather = sum(self._exchange(layout, key, count, 1) for key, count in inside.items() if key.endswith(".enter"))
        forward = self.dense(part, tokens) + core + Seconds(exchange=exchange)
        return LayerTime(forward, core, Seconds(exchange=gather))
