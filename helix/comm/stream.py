"""The residual stream between partitioned blocks: replicated on the m * n ranks, or sharded over the tokens.

A block enters from the stream into sharded work and leaves it with a sum that is still unreduced. Both
layouts move the same bytes (an all-reduce is a reduce-scatter and an all-gather); the sharded one computes
norms and residual sums on N / (m * n) tokens instead of N, and routes each token once.

    layout        stream             enter                         leave
    replicated    x[N, E]            identity / all-reduce         all-reduce / identity
    sharded       x[N@model, E]      all-gather / reduce-scatter   reduce-scatter / all-gather

(forward / backward). N is the number of tokens B * T, flattened, so that a shard is contiguous and any batch
and length can be cut; where m * n does not divide N the last shard is padded with zero rows, which are moved
and counted but never read.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from helix.comm import collectives
from helix.comm.mesh import Axis
from helix.comm.parameters import Work


class Stream(Protocol):
    """What a block needs to know about the residual stream's layout."""

    work: Work
    axis: Axis

    def enter(self, x: Tensor, tokens: int, name: str) -> Tensor:
        """The stream -> x[N, E], for sharded work."""

    def leave(self, x: Tensor, name: str) -> Tensor:
        """x[N, E]{unreduced: model} -> the stream."""

    def leave_whole(self, x: Tensor, name: str) -> Tensor:
        """x[N, E], the same on every rank -> the stream."""

    def finish(self, x: Tensor, tokens: int, name: str) -> Tensor:
        """The stream -> x[N, E], for replicated work."""


class Replicated:
    """x[N, E] on every rank."""

    work = Work.REPLICATED

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def enter(self, x: Tensor, tokens: int, name: str) -> Tensor:
        return collectives.replicate(x, self.axis, f"{name}.enter")

    def leave(self, x: Tensor, name: str) -> Tensor:
        return collectives.reduce(x, self.axis, f"{name}.leave")

    def leave_whole(self, x: Tensor, name: str) -> Tensor:
        return x

    def finish(self, x: Tensor, tokens: int, name: str) -> Tensor:
        return x


class Sharded:
    """x[N@model, E]: ceil(N / (m * n)) tokens on each rank."""

    work = Work.SHARDED

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def enter(self, x: Tensor, tokens: int, name: str) -> Tensor:
        return collectives.all_gather(x, self.axis, f"{name}.enter")[:tokens]

    def leave(self, x: Tensor, name: str) -> Tensor:
        return collectives.reduce_scatter(self._pad(x), self.axis, f"{name}.leave")

    def leave_whole(self, x: Tensor, name: str) -> Tensor:
        return collectives.split(self._pad(x), self.axis, f"{name}.leave")

    def finish(self, x: Tensor, tokens: int, name: str) -> Tensor:
        return collectives.gather(x, self.axis, f"{name}.finish")[:tokens]

    def _pad(self, x: Tensor) -> Tensor:
        missing = -x.shape[0] % self.axis.size
        return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def make_stream(kind: str, axis: Axis) -> Stream:
    """The layout by its config name, `sharded` or `replicated`."""
    streams: dict[str, type[Sharded] | type[Replicated]] = {"sharded": Sharded, "replicated": Replicated}
    return streams[kind](axis)
