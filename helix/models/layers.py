"""The parts of a transformer around attention, each cut over all m * n ranks.

Sharded-shape notation as in `helix.partition.grid`; F@model means cut over all m * n ranks as one axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from helix.comm.mesh import Mesh
from helix.comm.parameters import empty_parameter, fill, fill_normal, local
from helix.comm.record import phase
from helix.comm.stream import Stream
from helix.partition.grid import shard_range

NORM_EPS = 1e-6
_SHARD_ROWS = (Shard(0),)
_SHARD_COLUMNS = (Shard(1),)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the residual stream; weight[E] on every rank."""

    def __init__(self, width: int, mesh: Mesh, stream: Stream, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = empty_parameter((width,), mesh.weights, (Replicate(), Replicate()), dtype)
        self.work = stream.work

    def init_weights(self) -> None:
        fill(self.weight, torch.ones(*self.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """x[.., E] -> [.., E]."""
        return F.rms_norm(x, (x.shape[-1],), local(self.weight, self.work), NORM_EPS)


class FeedForward(nn.Module, ABC):
    """What follows attention in a block: an MLP, or experts."""

    @abstractmethod
    def init_weights(self, seed: int, name: str) -> None:
        """Fill the weights with values that depend on seed and name, not on the layout."""

    @abstractmethod
    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """The stream -> the stream, for B x T = `shape` tokens."""


class MLP(FeedForward):
    """gelu(x W_up^T) W_down^T; up[F@model, E] column-parallel, down[E, F@model] row-parallel."""

    def __init__(self, width: int, hidden: int, mesh: Mesh, stream: Stream, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.up = empty_parameter((hidden, width), mesh.flat, _SHARD_ROWS, dtype)
        self.down = empty_parameter((width, hidden), mesh.flat, _SHARD_COLUMNS, dtype)
        self.stream = stream

    def init_weights(self, seed: int, name: str) -> None:
        fill_normal(self.up, self.up.shape[1] ** -0.5, seed, f"{name}.up")
        fill_normal(self.down, self.down.shape[1] ** -0.5, seed, f"{name}.down")

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        x = self.stream.enter(x, shape[0] * shape[1], "mlp")
        with phase("mlp"):
            x = F.linear(F.gelu(F.linear(x, local(self.up))), local(self.down))
        return self.stream.leave(x, "mlp")


class Embedding(nn.Module):
    """weight[V@model, E]; each rank looks up the tokens of its own part of the vocabulary."""

    def __init__(self, vocab: int, width: int, mesh: Mesh, stream: Stream, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = empty_parameter((vocab, width), mesh.flat, _SHARD_ROWS, dtype)
        self.owned = shard_range(vocab, mesh.grid.ranks, mesh.model.rank)
        self.stream = stream

    def init_weights(self, seed: int, name: str) -> None:
        fill_normal(self.weight, 1.0, seed, f"{name}.weight")

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens[N], the same on every rank -> the stream."""
        weight = local(self.weight)
        if not self.owned:  # more ranks than words
            return self.stream.leave(weight.new_zeros(tokens.numel(), weight.shape[1]) + weight.sum() * 0, "embedding")
        index = tokens - self.owned.start
        outside = (index < 0) | (index >= len(self.owned))
        x = F.embedding(index.masked_fill(outside, 0), weight).masked_fill(outside[:, None], 0)
        return self.stream.leave(x, "embedding")


class Head(nn.Module):
    """Logits from weight[V@model, E], column-parallel; they stay cut over the vocabulary."""

    def __init__(self, vocab: int, width: int, mesh: Mesh, stream: Stream, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = empty_parameter((vocab, width), mesh.flat, _SHARD_ROWS, dtype)
        self.stream = stream

    def init_weights(self, seed: int, name: str) -> None:
        fill_normal(self.weight, self.weight.shape[1] ** -0.5, seed, f"{name}.weight")

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """The stream -> logits[N, V@model]."""
        x = self.stream.enter(x, shape[0] * shape[1], "head")
        with phase("head"):
            return F.linear(x, local(self.weight))
