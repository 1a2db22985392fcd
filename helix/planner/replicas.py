"""What replicas cost each other in training: the sum of their gradients, and each other's parameters where they share.

With `shard_data` (FSDP2, `helix.parallel.shard_data`) a replica keeps its part of parameters, gradients and moments. A
layer's parameters are gathered before it runs, forward and backward, and its gradients reduce-scattered after the last
backward pass; while microbatches accumulate, gradients are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from helix.partition.shape import TransformerShape
from helix.planner.layout import Layout
from helix.planner.machine import Machine
from helix.planner.work import Work


@dataclass(frozen=True)
class Group:
    """Parameters of one rank that `size` ranks hold alike: ranks r + stride * k."""

    parameters: float
    size: int
    stride: int


@dataclass(frozen=True)
class Replicas:
    """The replicas of one model's training."""

    shape: TransformerShape
    machine: Machine
    work: Work

    def own_parameters(self, layout: Layout, parameters: float, ep_size: int) -> float:
        """Of a rank's parameters those that it alone updates."""
        if not layout.shard_data:
            return parameters
        return sum(group.parameters / group.size for group in self._groups(layout, parameters, ep_size))

    def memory(self, layout: Layout, weights: int, unit: int, ep_size: int) -> tuple[int, int]:
        """Bytes of the parameters that a rank holds, and of their gradients and moments.

        Args:
            weights: of a rank's whole parameters.
            unit: of what is gathered at once, a layer or an embedding; whole in the one that runs.
        """
        itemsize = self.work.weight_bytes
        own = round(self.own_parameters(layout, weights / itemsize, ep_size) * itemsize)
        if own == weights:
            return weights, 3 * weights
        held = min(weights, own + unit)
        return held, 2 * own + (weights if layout.microbatches > 1 else held)

    def exchange(self, layout: Layout, parameters: float, ep_size: int) -> float:
        """Seconds of a step's collectives over replicas, and of experts' gradients over their replicas in a grid."""
        out = 0.0
        for group in self._groups(layout, parameters, ep_size):
            out += self._shared(layout, group) if layout.shard_data else self._summed(group)
        inside = layout.grid.ranks // ep_size
        if self.shape.experts and layout.method != "data" and inside > 1:
            out += self._summed(Group(self._experts(layout, ep_size), inside, ep_size))
        return out

    def _groups(self, layout: Layout, parameters: float, ep_size: int) -> Iterator[Group]:
        """All parameters of a rank; experts that replicas share out have fewer replicas than the rest."""
        size, stride = layout.data, layout.stage * layout.stage_ranks
        if layout.tokens > 1:  # which have the same weights
            size, stride = size * layout.tokens, layout.grid.ranks
        apart = self._experts(layout, ep_size) if layout.method == "data" and ep_size > 1 else 0.0
        yield Group(parameters - apart, size, stride)
        if apart:
            yield Group(apart, size // ep_size, stride * ep_size)

    def _experts(self, layout: Layout, ep_size: int) -> float:
        """Parameters of a rank's experts."""
        return -(-self.shape.layers // layout.stage) * self.shape.experts * self.shape.expert_parameters / ep_size

    def _summed(self, group: Group) -> float:
        return self.machine.collective("all_reduce", 2 * self._sent(group), group.size, group.stride)

    def _shared(self, layout: Layout, group: Group) -> float:
        """One collective for each layer: gathers forward and backward of each microbatch, then one reduce-scatter."""
        layers = -(-self.shape.layers // layout.stage)
        each = self._sent(group) / layers
        gather = self.machine.collective("all_gather", each, group.size, group.stride)
        scatter = self.machine.collective("reduce_scatter", each, group.size, group.stride)
        return layers * (2 * layout.microbatches * gather + scatter)

    def _sent(self, group: Group) -> float:
        """Bytes that a rank sends in a gather of all, or in a reduce-scatter."""
        return (group.size - 1) / group.size * group.parameters * self.work.weight_bytes
