"""The modules that stand in a partitioned model where its linear layers and embedding stood.

Parameters are plain tensors: the rank's part, in the original's orientation and under its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix.comm import collectives
from helix.comm.mesh import Axis


class Part(nn.Module):
    """A linear layer's part.

    Args:
        weight: [out, in], or [in, out] if transposed (transformers' Conv1D).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool) -> None:
        super().__init__()
        self.weight, self.transposed = nn.Parameter(weight, requires_grad=weight.is_floating_point()), transposed
        self.bias = None if bias is None else nn.Parameter(bias)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight.t() if self.transposed else self.weight, bias)


class Columns(Part):
    """Cut by its outputs: x[.., E] -> [.., F@model]. The input has entered sharded work already."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.bias)


class Rows(Part):
    """Cut by its inputs: x[.., F@model] -> [.., E] on every rank; the bias is added once, to the sum."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool, axis: Axis, name: str) -> None:
        super().__init__(weight, bias, transposed)
        self.axis, self.name = axis, name

    def forward(self, x: Tensor) -> Tensor:
        partial = self.linear(x, None)
        y = collectives.reduce(partial, self.axis, f"{self.name}.leave")
        return y if self.bias is None else y + self.bias


class Heads:
    """Queries, keys and values of the rank's head group: computed in slices of features, gathered to whole heads.

    The first of the layers that it ties computes all of them, with one collective; the others hand out their share.
    So the model's own code, which calls them one after the other on the same input, goes on with whole heads: its
    norms, rotary embeddings and cache do their work unchanged.

    Args:
        head_dim: D.
        axis: of the slices.
    """

    def __init__(self, head_dim: int, axis: Axis) -> None:
        self.head_dim, self.axis = head_dim, axis
        self.layers: list[Projection] = []
        self._left: list[Tensor] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """x[B, T, E] -> the index-th layer's [B, T, heads@head * D]."""
        if index == 0:
            self._left = self._compute(x)
        out, self._left[index] = self._left[index], x  # not held longer than it is needed
        return out

    def _compute(self, x: Tensor) -> list[Tensor]:
        slices = [layer.linear(x, layer.bias) for layer in self.layers]
        width = self.head_dim // self.axis.size
        counts = [piece.shape[-1] // width for piece in slices]
        whole = torch.cat(slices, -1)
        if self.axis.size > 1:
            # [m, B, T, heads, D / m] -> [B, T, heads, D]
            own = whole.unflatten(-1, (-1, width)).unsqueeze(0)
            whole = collectives.all_gather(own, self.axis, "attention.qkv").movedim(0, -2).flatten(-3)
        return list(whole.split([count * self.head_dim for count in counts], -1))


class Projection(Part):
    """A query, key or value projection, cut over head groups and slices: x[B, T, E] -> [B, T, heads@head * D]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool, heads: Heads) -> None:
        super().__init__(weight, bias, transposed)
        self.heads, self.index = heads, len(heads.layers)
        heads.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads.take(self.index, x)
