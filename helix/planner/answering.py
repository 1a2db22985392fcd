"""Time of a pretrained model's prompt and of its decoding steps, as `helixify` partitions it.

The stream is whole on every rank (a rival's is cut over tokens: an all-reduce's halves on both sides of the norms, so
the same bytes); projections gather whole heads of the head group inside the m-group; experts are cut
inside each expert, so that chance cannot make ranks uneven. Bytes are those of `helix.partition.decoding`. Replicas
that share whole experts out among them are another project's way, and a rival.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from helix.partition import wire
from helix.partition.decoding import GenerationCost
from helix.partition.families import PretrainedShape
from helix.partition.phases import Phases
from helix.partition.shape import TransformerShape
from helix.planner.layout import Layout
from helix.planner.passes import LayerTime, Passes
from helix.planner.routing import expected_fullest, expected_touched
from helix.planner.seconds import Seconds

PARTIAL_ITEMSIZE = 4  # partial outputs are merged in fp32


@dataclass(frozen=True)
class Answering:
    """Times of one model's answers.

    Args:
        passes: of the same model and machine.
    """

    passes: Passes

    def prefill(self, layout: Layout, batch: int, length: int, ep_size: int) -> tuple[LayerTime, Seconds]:
        """A layer's pass over the prompts, and the ends': of the head for the last tokens alone."""
        passes = self.passes
        cost = passes.cost_of(layout.at(method="tensor"), batch, length, 1)
        moved = self._cost(layout, batch).prefill_bytes(length)
        core = passes.core(layout, cost)
        exchange = Seconds(exchange=self._exchanged(layout, moved, layers=True))
        forward = core + passes.dense(cost, batch * length) + exchange + self._experts(layout, batch * length, ep_size)
        return LayerTime(forward, core, Seconds()), self._ends(layout, batch, moved)

    def step(self, layout: Layout, batch: int, context: int, ep_size: int) -> tuple[Seconds, Seconds]:
        """A layer's decoding step, and the ends': one token of each of `batch` samples against `context` others."""
        passes, shape = self.passes, self.passes.kept(layout)
        cost = passes.cost_of(layout.at(method="tensor"), batch, 1, 1)
        cache = self.cache_bytes(layout, batch, context) // passes.shape.layers
        flops = cache // passes.itemsize * 2 * shape.layout.queries_per_kv * layout.sharers
        moved = self._cost(layout, batch).step_bytes()
        exchange = self._exchanged(layout, moved, layers=True) + self._shared(layout, batch)
        layer = Seconds(attention=passes.machine.attention(flops, cache), exchange=exchange)
        layer += passes.dense(cost, batch) + self._experts(layout, batch, ep_size)
        return layer, self._ends(layout, batch, moved)

    def sent_bytes(self, layout: Layout, batch: int, length: int) -> int:
        """Bytes that one rank sends in one layer of the prompts' pass."""
        moved = self._cost(layout, batch).prefill_bytes(length)
        inside = sum(count for key, count in moved.items() if _in_layers(key))
        return inside // self.passes.shape.layers

    def cache_bytes(self, layout: Layout, batch: int, tokens: int) -> int:
        """Bytes of the keys and values of all layers on the fullest rank."""
        return self._cost(layout, batch).cache_bytes(-(-tokens // layout.sharers))

    def _cost(self, layout: Layout, batch: int) -> GenerationCost:
        phases = Phases(layout.prefill, layout.cache)
        return GenerationCost(pretrained(self.passes.kept(layout)), layout.grid, phases, batch, self.passes.itemsize)

    def _exchanged(self, layout: Layout, moved: Counter[str], layers: bool) -> float:
        """Seconds of one layer's collectives, or of the ends'."""
        out = 0.0
        for key, nbytes in moved.items():
            kind, name = key.split("/")
            within = name.startswith("attention.") and name != "attention.leave"
            if _in_layers(key) == layers:
                share = nbytes // self.passes.shape.layers if layers else nbytes
                out += self.passes.machine.collective(kind, share, layout.m if within else layout.grid.ranks)
        return out

    def _shared(self, layout: Layout, batch: int) -> float:
        """Seconds in which the sharers of a key/value head ask each other's tokens, and merge what they answer."""
        sharers, shape = layout.sharers, self.passes.shape
        if sharers == 1:
            return 0.0
        rows = batch * shape.heads // layout.n
        asked = wire.all_gather(rows * shape.head_dim, sharers, self.passes.itemsize)
        share = rows * (shape.head_dim + 1)
        merged = wire.all_to_all(sharers * share, share, PARTIAL_ITEMSIZE)
        machine = self.passes.machine
        return machine.collective("all_gather", asked, sharers) + machine.collective("all_to_all", merged, sharers)

    def _ends(self, layout: Layout, batch: int, moved: Counter[str]) -> Seconds:
        head = self.passes.head(batch, -(-self.passes.shape.vocab // layout.grid.ranks))
        return head + Seconds(exchange=self._exchanged(layout, moved, layers=False))

    def _experts(self, layout: Layout, tokens: int, ep_size: int) -> Seconds:
        """Each rank's share of every expert that a token goes to; of replicas that share them out, whole ones."""
        shape, passes, e = self.passes.shape, self.passes, self.passes.itemsize
        if not shape.experts:
            return Seconds()
        rows, shares = tokens * shape.top_k * ep_size, max(layout.grid.ranks, ep_size)
        read = expected_touched(rows, shape.experts) * shape.expert_parameters * e / shares
        own = expected_fullest(rows, ep_size) if ep_size > 1 else rows / shares
        # Where experts are cut inside, every rank reads and writes the whole rows.
        through = own if ep_size > 1 else rows
        matmul = passes.machine.matmul(2 * own * shape.expert_parameters, read + 2 * through * shape.width * e)
        sent = tokens * shape.top_k * shape.width * e * (ep_size - 1) // ep_size
        return Seconds(
            matmul=matmul + passes.machine.kernel_s + passes.product(tokens, shape.width, shape.experts),
            memory=passes.machine.stream(own * shape.mlp_hidden * shape.mlp_matrices * e),
            exchange=2 * passes.machine.collective("all_to_all", sent, ep_size),
        )


def _in_layers(key: str) -> bool:
    """Whether a counter's key is of the layers, not of the model's ends."""
    return key.split("/")[1].split(".")[0] in ("attention", "mlp")


def pretrained(shape: TransformerShape) -> PretrainedShape:
    """A transformer's dims as those of a Hugging Face model; of a family with one embedding, as most have."""
    return PretrainedShape(
        "llama",
        shape.layers,
        shape.width,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.mlp_hidden,
        shape.vocab,
        context=1,  # which nothing here reads
        experts=shape.experts,
        top_k=shape.top_k,
        shared_hidden=shape.shared_hidden,
        tied=shape.tied,
    )


def planned(shape: PretrainedShape, gated: bool) -> TransformerShape:
    """A Hugging Face model's dims as a transformer's.

    Heads are whole when they are turned, so that RoPE's pairs bind no slice; a window is not known to the time model,
    which takes every layer to see all tokens.
    """
    return TransformerShape(
        shape.layers,
        shape.width,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.mlp_hidden,
        shape.vocab,
        rope=False,
        causal=shape.causal,
        experts=shape.experts,
        top_k=max(1, shape.top_k),
        gated=gated,
        tied=shape.tied,
        shared_hidden=shape.shared_hidden if shape.experts else 0,
    )


def without_pairs(shape: TransformerShape) -> TransformerShape:
    """The same for a model that generates: see `planned`."""
    return replace(shape, rope=False)
