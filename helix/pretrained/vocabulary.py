"""Embeddings cut over their rows: each rank looks up the ids that it has, and one sum makes every row whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helix.comm import collectives
from helix.comm.mesh import Axis


def cut_embedding(module: nn.Embedding, weight: nn.Parameter, axis: Axis, name: str) -> None:
    """Let an embedding[V, E] hold the rows `weight`[V@model, E], in place; its own forward goes on scaling them.

    Args:
        name: of its collective.
    """
    vocab, padding = module.num_embeddings, module.padding_idx
    module.weight, module.num_embeddings = weight, weight.shape[0]
    if axis.size == 1:
        return
    rows = _Rows(axis, vocab, weight.shape[0], name)
    own = None if padding is None else padding - rows.first
    module.padding_idx = own if own is not None and 0 <= own < rows.count else None
    module.register_forward_pre_hook(rows.enter)
    module.register_forward_hook(rows.leave)


class _Rows:
    """A rank's rows of an embedding, as hooks around its forward."""

    def __init__(self, axis: Axis, vocab: int, count: int, name: str) -> None:
        self.axis, self.vocab, self.count, self.name = axis, vocab, count, f"{name}.leave"
        self.first = axis.rank * count
        self._others: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        """ids[B, T] -> the rank's row of each; row 0 for others' ids, whose output `leave` sets to 0."""
        ids = args[0]
        if ids.is_cuda:
            # As an embedding's own kernel there: it stops the device, and the host need not wait for the answer.
            torch._assert_async(((ids >= 0) & (ids < self.vocab)).all(), f"ids must be 0 to {self.vocab - 1}")
        elif ids.numel() and not (ids.min() >= 0 and ids.max() < self.vocab):
            raise IndexError(
                f"ids must be 0 to {self.vocab - 1}, and there is one of {int(ids.min())} or {int(ids.max())}"
            )
        own = ids - self.first
        self._others = (own < 0) | (own >= self.count)
        return own.masked_fill(self._others, 0)

    def leave(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """out[B, T, E] of the rank's rows -> of all."""
        assert self._others is not None
        partial, self._others = out.masked_fill(self._others.unsqueeze(-1), 0), None
        return collectives.reduce(partial, self.axis, self.name)
