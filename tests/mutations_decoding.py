"""Decoding that is wrong: the cache that ranks keep, and the merge of their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mutation import BOTH, Mutation, decodes, replaced
from torch import Tensor

from helix.certify.cases import LARGE, Case
from helix.pretrained import sharing, store


def _stale(real: Callable[..., None]) -> Callable[..., None]:
    """What comes after the prompt is not what is kept: the last token's keys and values are, once more."""

    def wrong(self: Any, keys: Tensor, values: Tensor) -> None:
        if keys.shape[2] == 1 and self.keys.shape[2] > 0:
            keys, values = self.keys[:, :, -1:].clone(), self.values[:, :, -1:].clone()
        real(self, keys, values)

    return wrong


def _even_weights(real: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A merge in which every rank's part counts as much, whatever its log-sum-exp."""

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        out, sums = real(*args)
        return out, torch.where(sums > -1e30, sums * 0, sums)

    return wrong


def _neighbours(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rank keeps the next one's KV heads."""

    def wrong(self: Any, new: Tensor, first: int) -> Tensor:
        return real(self, new.roll(1, 1), first)

    return wrong


def _overflowing(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Weights of a merge that are not taken relative to the largest: right, until exp overflows."""

    def wrong(self: Tensor, dim: int) -> Tensor:
        if dim != 0:  # the oracle's own
            return real(self, dim)
        weights = self.exp()
        return weights / weights.sum(dim, keepdim=True)

    return wrong


DECODING = (
    Mutation(
        "a stale cache", replaced(store.Store, "append", _stale), decodes("rows", "kvseq", *BOTH), "output of step"
    ),
    Mutation(
        "a stale cache of samples",
        replaced(store.Store, "append", _stale),
        decodes("rows", "batch", *BOTH),
        "output of step",
    ),
    Mutation(
        "a merge without weights",
        replaced(sharing, "partial", _even_weights),
        decodes("heads", "kvseq", *BOTH),
        "output of step",
    ),
    Mutation(
        "another rank's KV heads",
        replaced(sharing.KeyHeads, "keep", _neighbours),
        decodes("rows", "heads", *BOTH),
        "output of step",
    ),
    Mutation(
        "a merge that overflows",
        replaced(Tensor, "softmax", _overflowing),
        (Case("decode", "rows", "fp32", "kvseq", LARGE),),
        "output of step",
    ),
)
