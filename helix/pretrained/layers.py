"""The modules that stand in a partitioned model where its linear layers stood.

Parameters are plain tensors: the rank's part, in the original's orientation and under its name. An activation on its
way into a block that the ranks share is marked, so that its gradient is summed over them; outside of training that
costs one comparison.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix.comm import collectives, transport
from helix.comm.mesh import Axis


class Part(nn.Module):
    """A linear layer's part: x[.., in] -> [.., out], whatever of the two is cut.

    Args:
        weight: [out, in], or [in, out] if transposed (transformers' Conv1D).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight.t() if self.transposed else self.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.bias)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


class Entry:
    """Where a replicated activation enters sharded work. The layers that take it one after the other share the mark.

    Args:
        axis: of the ranks that share the work.
        name: of the block.
    """

    def __init__(self, axis: Axis, name: str) -> None:
        self.axis, self.name = axis, f"{name}.enter"
        self.layers = 0
        self._given: Tensor | None = None
        self._marked: Tensor | None = None

    def join(self) -> int:
        """One more layer; returns its index."""
        self.layers += 1
        return self.layers - 1

    def take(self, x: Tensor, index: int = 0) -> Tensor:
        """x for the index-th layer."""
        if not x.requires_grad:
            return x
        if self._marked is None or self._given is not x:
            self._given, self._marked = x, collectives.replicate(x, self.axis, self.name)
        marked = self._marked
        if index >= self.layers - 1:  # not held longer than it is needed: a whole step hangs on it
            self._given = self._marked = None
        return marked


class Columns(Part):
    """Cut by its outputs: x[.., E] -> [.., F@model]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, entry: Entry) -> None:
        super().__init__(weight, bias, transposed)
        self.entry, self.index = entry, entry.join()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.entry.take(x, self.index), self.bias)


class Rows(Part):
    """Cut by its inputs: x[.., F@model] -> [.., E] on every rank; the bias is added once, to the sum."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, axis: Axis, name: str
    ) -> None:
        super().__init__(weight, bias, transposed)
        self.axis, self.name = axis, f"{name}.leave"

    def forward(self, x: Tensor) -> Tensor:
        y = collectives.reduce(self.linear(x, None), self.axis, self.name)
        return y if self.bias is None else y + self.bias


class Gathered(Part):
    """Cut by its outputs, which every rank then gathers: x[.., E] -> [.., V].

    Args:
        out: V; the ranks' parts together may be longer, by zeros.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, axis: Axis, name: str, out: int
    ) -> None:
        super().__init__(weight, bias, transposed)
        self.entry, self.axis, self.name, self.out_features = Entry(axis, name), axis, f"{name}.leave", out

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.entry.take(x), self.bias)
        if self.axis.size == 1:
            return y
        parts = collectives.gather(y.unsqueeze(0), self.axis, self.name)
        whole = torch.cat(parts.unbind(0), -1)
        return whole[..., : self.out_features].contiguous()


class Heads:
    """Queries, keys and values of the rank's head group: computed in slices of features, gathered to whole heads.

    The first of the layers that it ties computes all of them, with one collective; the others hand out their share.
    So the model's own code, which calls them one after the other on the same input, goes on with whole heads: its
    norms, rotary embeddings and cache do their work unchanged.

    Args:
        head_dim: D.
        axis: of the slices.
        entry: of all ranks that share the attention.
    """

    def __init__(self, head_dim: int, axis: Axis, entry: Entry) -> None:
        self.head_dim, self.axis, self.entry = head_dim, axis, entry
        self.layers: list[Projection] = []
        self._left: list[Tensor] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """x[B, T, E] -> the index-th layer's [B, T, heads@head * D]."""
        if index == 0:
            self._left = self._compute(self.entry.take(x))
        out, self._left[index] = self._left[index], x  # not held longer than it is needed
        if index == len(self.layers) - 1:
            self._left = []
        return out

    def _compute(self, x: Tensor) -> list[Tensor]:
        slices = [layer.linear(x, layer.bias) for layer in self.layers]
        if self.axis.size == 1:
            return slices
        width = self.head_dim // self.axis.size
        counts = [piece.shape[-1] * self.axis.size for piece in slices]
        own = torch.cat(slices, -1) if len(slices) > 1 else slices[0]
        # [m, B, T, heads, D / m] -> [B, T, heads * D]
        parts = collectives.all_gather(own.unflatten(-1, (-1, width)).unsqueeze(0), self.axis, "attention.qkv")
        return list(parts.movedim(0, -2).flatten(-3).split(counts, -1))


class Projection(Part):
    """A query, key or value projection, cut over head groups and slices: x[B, T, E] -> [B, T, heads@head * D]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, heads: Heads) -> None:
        super().__init__(weight, bias, transposed)
        self.heads, self.index = heads, len(heads.layers)
        heads.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads.take(self.index, x)


class HeadNorm:
    """A hook before a norm of heads' features, which sees the rank's own heads: its gradient is summed over the ranks.

    It marks the weights that the norm has when it is called, since loading may put others into their place.

    Args:
        axis: of all ranks that share the attention.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, norm: nn.Module, args: object) -> None:
        if not torch.is_grad_enabled():
            return
        for parameter in norm.parameters():
            if parameter.requires_grad and not hasattr(parameter, "helix_summed"):
                parameter.register_hook(lambda grad: transport.all_reduce(grad, self.axis, "norm.grad"))
                parameter.helix_summed = True  # type: ignore[attr-defined]
