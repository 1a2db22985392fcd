"""What a layout costs: seconds, by what they are spent on, and bytes of one rank, by what holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from helix.partition.shape import TransformerShape, default_expert_parallel
from helix.partition.transformer_cost import TransformerCost
from helix.planner.answering import Answering
from helix.planner.layout import Layout
from helix.planner.machine import Machine
from helix.planner.passes import LayerTime, Passes
from helix.planner.replicas import Replicas
from helix.planner.seconds import Seconds
from helix.planner.work import HEADROOM, Estimate, Memory, Work

T = TypeVar("T")
# FLOPs of a backward pass over those of the forward pass: two products for each one; fused attention computes its
# scores again (FlashAttention-2, section 4.1: 2.5).
BACKWARD, FUSED_BACKWARD = 2.0, 2.5


@dataclass(frozen=True)
class Estimator:
    """Costs of layouts of one model's work on one machine; what layouts share is computed once."""

    shape: TransformerShape
    machine: Machine
    work: Work
    _known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def _generates(self) -> bool:
        return self.work.mode == "generate"

    @cached_property
    def passes(self) -> Passes:
        return Passes(self.shape, self.machine, self.work.itemsize, self.work.commonest)

    @cached_property
    def answering(self) -> Answering:
        return Answering(self.passes)

    @cached_property
    def replicas(self) -> Replicas:
        return Replicas(self.shape, self.machine, self.work)

    @property
    def room(self) -> float:
        """Bytes of a device that a layout may fill, besides what a rank's process takes anyway."""
        return HEADROOM * self.machine.memory_bytes - self.machine.rank_bytes

    def estimate(self, layout: Layout) -> Estimate:
        memory = self.memory(layout)
        if self.work.mode == "train":
            return self._training(layout, memory)
        if self._generates:
            return self._generation(layout, memory)
        seconds = self._forward(layout, self.work.length)
        return Estimate(layout, seconds, memory, self.work.batch * self.work.length / seconds.total)

    def ep_size(self, layout: Layout) -> int:
        """Ranks that share one set of whole experts; 1 where experts are cut inside, as in a pretrained model."""
        if not self.shape.experts:
            return 1
        if layout.method == "data":
            return default_expert_parallel(self.shape.experts, layout.data)
        return 1 if self._generates else default_expert_parallel(self.shape.experts, layout.grid.ranks)

    def memory(self, layout: Layout) -> Memory:
        """Bytes of the fullest rank, by the closed forms that commands refuse by (`helix.config.memory`)."""
        weights, state = self._whole_weights(layout), 0
        if self.work.mode == "train":
            weights, state = self.replicas.memory(layout, weights, self._unit_bytes(layout), self.ep_size(layout))
        return Memory(weights, state, self._activation_bytes(layout), self._cache_bytes(layout))

    def prefill_cost(self, layout: Layout) -> tuple[float, float]:
        """All of a layout's cost that its prefill schedule decides: seconds of a layer, bytes of activations."""
        layer, _ = self._layer(layout, self.samples(layout), self.work.length)
        seconds = self._both(layout, layer) if self.work.mode == "train" else layer.forward
        return seconds.total, self._activation_bytes(layout)

    def decode_cost(self, layout: Layout) -> tuple[float, float]:
        """All of a layout's cost that the cut of its cache decides: seconds of a layer, bytes of the cache."""
        layer, _ = self._step(layout)
        return layer.total, self._cache_bytes(layout)

    def sent_bytes(self, layout: Layout) -> int:
        """Bytes that one rank sends in one layer of a pass over whole sequences, forward."""
        batch, length = self.samples(layout), self.work.length
        if self._generates:
            return self.answering.sent_bytes(layout, batch, length)
        return self.passes.sent_bytes(layout, batch, length, self.ep_size(layout))

    def fits(self, memory: Memory) -> bool:
        return memory.total <= self.room

    def samples(self, layout: Layout) -> int:
        """Of the fullest microbatch."""
        return -(-self._replica(layout) // layout.microbatches)

    def _replica(self, layout: Layout) -> int:
        return -(-self.work.batch // layout.data)

    def _stage_shape(self, layout: Layout) -> TransformerShape:
        """The layers of the fullest stage; of several stages none has both ends."""
        shape = self.shape
        return replace(
            shape,
            layers=-(-shape.layers // layout.stage),
            kv_heads=shape.kv_heads * layout.kv_copies,
            tied=shape.tied or layout.stage > 1,
        )

    def _once(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """What `compute` gives, computed for the first of all layouts that share `key`."""
        if key not in self._known:
            self._known[key] = compute()
        known: T = self._known[key]
        return known

    def _whole_weights(self, layout: Layout) -> int:
        """Bytes of a rank's parameters, with those that `shard_data` leaves on other replicas."""
        key = ("weights", layout.replica, layout.stage, self.ep_size(layout))
        return self._once(key, lambda: self._weight_bytes(layout))

    def _unit_bytes(self, layout: Layout) -> int:
        """Bytes of the parameters that FSDP2 gathers at once on a rank: a layer's, or an embedding's."""
        layer = replace(self._stage_shape(layout), layers=1, vocab=1)
        end = -(-self.shape.vocab // layout.grid.ranks) * self.shape.width * self.work.weight_bytes
        return max(self._held_weights(layout, layer), end)

    def _held_weights(self, layout: Layout, shape: TransformerShape) -> int:
        """Bytes of the parameters of some layers on a rank."""
        cost = TransformerCost(shape, layout.grid, layout.options, 1, 1, self.work.weight_bytes, self.ep_size(layout))
        return cost.weight_bytes(0)

    def _weight_bytes(self, layout: Layout) -> int:
        stage, itemsize = self._stage_shape(layout), self.work.weight_bytes
        held = self._held_weights(layout, stage)
        if self._generates and layout.method != "data":
            experts = stage.layers * stage.experts * stage.expert_parameters * itemsize
            held -= experts - experts // layout.grid.ranks
        return held

    def _activation_bytes(self, layout: Layout) -> int:
        batch = self.samples(layout)
        key = ("held", layout.replica, layout.prefill, layout.stage, batch, layout.recompute)
        held = self._once(key, lambda: self._held(layout, batch))
        # GPipe keeps every microbatch; without stages gradients accumulate, one microbatch after the other.
        kept = layout.microbatches if self.work.mode == "train" and layout.stage > 1 else 1
        return -(-held * kept // layout.tokens)

    def _held(self, layout: Layout, batch: int) -> int:
        """Bytes of one microbatch's activations; of tokens that are cut over ranks, all ranks' together."""
        stage, work = self._stage_shape(layout), self.work
        if work.mode == "generate":  # of whose prompts only the last token meets the head
            stage = replace(stage, vocab=1)
        cost = TransformerCost(stage, layout.grid, layout.options, batch, work.length, work.itemsize)
        if work.mode != "train":
            return cost.activation_bytes()
        if layout.recompute != "full":
            return cost.saved_bytes(regather=layout.recompute == "selective")
        inputs = stage.layers * cost.tokens_per_shard * stage.width * work.itemsize
        return inputs + replace(cost, shape=replace(stage, layers=1)).saved_bytes()

    def _cache_bytes(self, layout: Layout) -> int:
        work, batch = self.work, self._replica(layout)
        if work.mode != "generate":
            return 0
        key = ("cache", layout.replica, layout.decode, batch, layout.stage)

        return self._once(key, lambda: self._cached(layout, batch))

    def _cached(self, layout: Layout, batch: int) -> int:
        whole = self.answering.cache_bytes(layout, batch, self.work.length + self.work.new_tokens)
        return whole // self.shape.layers * self._stage_shape(layout).layers

    def _layer(self, layout: Layout, batch: int, length: int) -> tuple[LayerTime, Seconds]:
        """A layer's pass and the ends', of one microbatch."""
        ep_size = self.ep_size(layout)
        key = ("layer", layout.replica, layout.prefill, batch, ep_size)
        return self._once(key, lambda: self._layer_and_ends(layout, batch, length, ep_size))

    def _layer_and_ends(self, layout: Layout, batch: int, length: int, ep_size: int) -> tuple[LayerTime, Seconds]:
        if self._generates:
            return self.answering.prefill(layout, batch, length, ep_size)
        ends = self.passes.ends(layout, batch, length, ep_size)
        return self.passes.layer(layout, batch, length, ep_size), ends

    def _pace(self, layout: Layout, layer: Seconds, ends: Seconds) -> Seconds:
        """Time of the slowest stage for one microbatch: the fullest one, or the last with the head."""
        layers = self.shape.layers
        fullest = layer * -(-layers // layout.stage)
        if layout.stage == 1:
            return fullest + ends
        last = layer * (layers // layout.stage) + ends
        return max(fullest, last, key=lambda each: each.total)

    def _piped(self, layout: Layout, pace: Seconds, sends: int) -> Seconds:
        """A pipeline's step: every microbatch through the slowest stage, the bubble, and the messages between."""
        count, stages = layout.microbatches, layout.stage
        out = pace * count
        if stages > 1:
            tokens = self.samples(layout) * self.work.length
            own = -(-tokens // layout.stage_ranks) * self.shape.width * self.work.itemsize
            hop = self.machine.send(own, distance=layout.stage_ranks)
            # A stream that ranks hold whole is put together again behind the link; a sharded one stays cut.
            if not layout.sharded and (layout.method == "tensor" or self._generates):
                hop += self.machine.collective("all_gather", own * (layout.grid.ranks - 1), layout.grid.ranks)
            messages = sends * layout.interleave * count + sends * (stages - 1)
            # With k stages at work the pipeline fills or drains; on shared cores they then have the others' turns.
            idle = sum(2 * self.machine.slot(k / stages) - 1 for k in range(1, stages))
            out += Seconds(exchange=messages * hop, waiting=idle * pace.total / layout.interleave)
        return out

    def _forward(self, layout: Layout, length: int) -> Seconds:
        layer, ends = self._layer(layout, self.samples(layout), length)
        return self._piped(layout, self._pace(layout, layer.forward, ends), sends=1)

    def _training(self, layout: Layout, memory: Memory) -> Estimate:
        layer, ends = self._layer(layout, self.samples(layout), self.work.length)
        pace = self._pace(layout, self._both(layout, layer), ends + self._backward(ends, layout.fused))
        step = self._piped(layout, pace, sends=2)
        ep_size, itemsize = self.ep_size(layout), self.work.weight_bytes
        parameters = self._whole_weights(layout) / itemsize
        step += Seconds(exchange=self.replicas.exchange(layout, parameters, ep_size))
        step += self.passes.optimizer(self.replicas.own_parameters(layout, parameters, ep_size), itemsize)
        return Estimate(layout, step, memory, self.work.batch * self.work.length / step.total)

    def _both(self, layout: Layout, layer: LayerTime) -> Seconds:
        """A layer's forward and backward pass, and what the latter computes again."""
        out = layer.forward + self._backward(layer.forward, layout.fused)
        if layout.recompute == "full":
            out += layer.forward
        elif layout.recompute == "selective":
            out += layer.core + layer.gather
        return out

    def _backward(self, forward: Seconds, fused: bool) -> Seconds:
        """Its products and streams; its collectives are the forward pass's own, mirrored."""
        attention = FUSED_BACKWARD if fused else BACKWARD
        return replace(
            forward,
            matmul=BACKWARD * forward.matmul,
            attention=attention * forward.attention,
            memory=BACKWARD * forward.memory,
        )

    def _generation(self, layout: Layout, memory: Memory) -> Estimate:
        work, new = self.work, self.work.new_tokens
        prompt = self._forward(layout, work.length)
        parts, batch = self._parts(layout)
        layer, ends = self._step(layout)
        pace = self._pace(layout, layer, ends)
        hop = (
            self.machine.send(batch * self.shape.width * work.itemsize, layout.grid.ranks) if layout.stage > 1 else 0.0
        )
        # Each token passes every stage; with fewer parts of the batch than stages the others wait.
        waiting = pace.total * (layout.stage * self.machine.slot(parts / layout.stage) - parts)
        token = pace * parts + Seconds(exchange=hop * layout.stage, waiting=waiting)
        whole = prompt + token * max(0, new - 1)
        return Estimate(layout, whole, memory, work.batch * new / whole.total, ttft_s=prompt.total, tpot_s=token.total)

    def _parts(self, layout: Layout) -> tuple[int, int]:
        """How many parts of a replica's batch follow each other through the stages, and samples of the largest."""
        parts = min(layout.stage, self._replica(layout))
        return parts, -(-self._replica(layout) // parts)

    def _step(self, layout: Layout) -> tuple[Seconds, Seconds]:
        """A layer's decoding step and the ends', with half of the new tokens in the cache."""
        _, batch = self._parts(layout)
        context, ep_size = self.work.length + max(1, self.work.new_tokens // 2), self.ep_size(layout)
        key = ("decode", layout.replica, layout.decode, batch, ep_size)
        return self._once(key, lambda: self.answering.step(layout, batch, context, ep_size))
