"""The ways in which the ranks of an m-group share attention: by tokens, by samples, or by KV heads.

Each says what of new keys and values a rank keeps in its cache, and how the ranks compute attention together: in
`prefill`, when all have the whole keys, and in `decode`, when each has its own. `helix.partition.phases` says which
is legal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from helix.attention.relayout import collect
from helix.comm import collectives, transport
from helix.comm.mesh import Axis
from helix.partition.phases import Phases, Stride, resolve, stride_of
from helix.partition.schedules import row_chunks
from helix.pretrained.kernel import Scoring, attention, partial


class Sharing(ABC):
    """One way.

    Args:
        axis: of the slices.

    Attributes:
        stride: which tokens a rank caches.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis, self.stride = axis, Stride()

    def __deepcopy__(self, memo: object) -> Sharing:
        """Itself: the cache of a prompt that many texts begin with may be copied; the ranks stay who they are."""
        return self

    @abstractmethod
    def keep(self, new: Tensor, first: int) -> Tensor:
        """Of new[B, K@head, T, D], at positions `first` on, what this rank caches; a view."""

    @abstractmethod
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring) -> Tensor:
        """Attention, k[B, K@head, S, D] being whole on every rank.

        Args:
            q, mask, causal: as of `kernel.attention`.

        Returns:
            [B, H@head, T, D@slice].
        """

    @abstractmethod
    def decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
        """Attention, k being what this rank kept, and the mask's columns those of its tokens; else as `prefill`."""

    def select(self, held: Tensor, samples: Tensor) -> Tensor:
        """What this rank caches once sample i is what sample samples[i] was."""
        return held.index_select(0, samples.to(held.device))


class Tokens(Sharing):
    """By tokens: in prefill each rank takes some of the query rows, in decode some of the keys.

    A decode step then moves the same bytes at any length of the context: each rank's partial outputs go to the ranks
    that want their features, with the log-sum-exp that weighs them, in one exchange. They go in fp32 at least: what
    a step's exchange costs is its latency, and so the sum of 16-bit outputs is rounded once, as on one device.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis)
        self.stride = stride_of("kvseq", axis.size, axis.rank)

    def keep(self, new: Tensor, first: int) -> Tensor:
        return new[:, :, self.stride.first(first) :: self.stride.step]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring) -> Tensor:
        if self.axis.size == 1:
            return attention(q, k, v, mask, scoring, causal)
        chunks = row_chunks(q.shape[2], self.axis.size, causal or mask is not None)
        pieces = []
        for run in chunks[self.axis.rank]:
            rows = slice(run.start, run.stop)
            seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
            keys = slice(run.stop if causal else None)
            pieces.append(attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], seen, scoring, causal))
        sizes = [sum(map(len, mine)) for mine in chunks]
        out = collect(torch.cat(pieces, 2).movedim(2, 0).contiguous(), self.axis, sizes, "attention.out")
        dealt = [run for mine in chunks for run in mine]
        parts = zip(dealt, out.split([len(run) for run in dealt]), strict=True)
        return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0].start)]).permute(1, 2, 0, 3)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
        if self.axis.size == 1:
            return attention(q, k, v, mask, scoring)
        out, lse = partial(q, k, v, mask, scoring)
        m, width = self.axis.size, out.shape[-1] // self.axis.size
        slices = out.reshape(-1, m, width)  # [B * H * T, m, D@slice]
        if slices.dtype != lse.dtype:
            slices = slices.to(lse.dtype)
        packed = torch.cat([slices, lse.reshape(-1, 1, 1).expand(-1, m, 1)], -1).transpose(0, 1)
        outs, sums = collectives.all_to_all_even(packed, self.axis, "attention.merge").split([width, 1], -1)
        merged = (outs * sums.softmax(0)).sum(0)
        return merged.to(q.dtype).view(*q.shape[:3], width)


class _Dealt(Sharing):
    """What both ways have in common that deal things with all their tokens: one's prefill is its decode."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring) -> Tensor:
        return self._attend(q, self.keep(k, 0), self.keep(v, 0), mask, causal, scoring)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
        return self._attend(q, k, v, mask, False, scoring)

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring) -> Tensor:
        """Attention, k and v being this rank's own."""


class Samples(_Dealt):
    """By samples, in the batch's order: each rank has whole heads, and all keys, of its own."""

    def keep(self, new: Tensor, first: int) -> Tensor:
        size = new.shape[0] // self.axis.size
        return new[self.axis.rank * size : (self.axis.rank + 1) * size]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring) -> Tensor:
        if self.axis.size == 1:
            return attention(q, k, v, mask, scoring, causal)
        seen = mask if mask is None or mask.shape[0] == 1 else self.keep(mask, 0)
        out = attention(self.keep(q, 0), k, v, seen, scoring, causal)
        return _features(out, self.axis).flatten(0, 1)

    def select(self, held: Tensor, samples: Tensor) -> Tensor:
        """Exchanges what belongs to another rank now; nothing if each rank's samples come from its own."""
        wanted, m, rank = samples.tolist(), self.axis.size, self.axis.rank
        if len(wanted) % m:
            raise ValueError(
                f"m={m} ranks share this cache by samples and cannot share {len(wanted)}; use decode=kvseq"
            )
        old, new = held.shape[0], len(wanted) // m
        shares = [wanted[r * new : (r + 1) * new] for r in range(m)]
        if all(sample // old == r for r in range(m) for sample in shares[r]):
            return held.index_select(0, torch.tensor(shares[rank], device=held.device) - rank * old)
        leaving = [[sample - rank * old for sample in share if sample // old == rank] for share in shares]
        send, receive = list(map(len, leaving)), [sum(s // old == r for s in shares[rank]) for r in range(m)]
        index = torch.tensor([sample for share in leaving for sample in share], dtype=torch.long, device=held.device)
        arrived = transport.all_to_all(held.index_select(0, index), self.axis, send, receive, "cache.select")
        order = sorted(range(new), key=lambda i: shares[rank][i] // old)  # as they come: by rank
        return arrived[torch.tensor(order, device=held.device).argsort()]


class KeyHeads(_Dealt):
    """By KV heads, each with its queries."""

    def keep(self, new: Tensor, first: int) -> Tensor:
        size = new.shape[1] // self.axis.size
        return new[:, self.axis.rank * size : (self.axis.rank + 1) * size]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring) -> Tensor:
        if self.axis.size == 1:
            return attention(q, k, v, mask, scoring, causal)
        out = attention(self.keep(q, 0), k, v, mask, scoring, causal)
        return _features(out, self.axis).transpose(0, 1).flatten(1, 2)


def _features(out: Tensor, axis: Axis) -> Tensor:
    """out[X@slice, Y, T, D] -> [m, X@slice, Y, T, D@slice]: every rank's things, in this rank's features."""
    slices = out.unflatten(-1, (axis.size, -1)).movedim(-2, 0)
    return collectives.all_to_all_even(slices.contiguous(), axis, "attention.out")


_WAYS: dict[str, type[Sharing]] = {
    "rows": Tokens,
    "kvseq": Tokens,
    "batch": Samples,
    "heads": KeyHeads,
}


class Held(NamedTuple):
    """What the keys are that the cache has just handed out: this rank's own.

    Args:
        keys: [B, K@head, S, D], or this rank's part of the tokens, samples or KV heads of it.
        sharing: how they are cut.
        columns: of the mask, which keys these are.
    """

    keys: Tensor
    sharing: Sharing
    columns: slice


class Place:
    """What one attention module and its cache know of the partition.

    Args:
        axis: of the slices.
        phases: how to cut attention.

    Attributes:
        held: what the cache has handed out for the module's next call; None if whole keys.
    """

    def __init__(self, axis: Axis, phases: Phases | None = None) -> None:
        self.axis, self.phases = axis, phases or Phases()
        self.held: Held | None = None
        self._ways = {name: way(axis) for name, way in _WAYS.items()}

    def __deepcopy__(self, memo: object) -> Place:
        """Itself, as in `Sharing`."""
        return self

    def prefill(self, keys: Tensor) -> Sharing:
        """How to cut a call with these whole keys[B, K@head, S, D]."""
        return self._ways[self._resolved(keys, Phases(prefill=self.phases.prefill)).prefill]

    def decode(self, keys: Tensor) -> Sharing:
        """How to cut a cache that begins with these whole keys[B, K@head, S, D]."""
        return self._ways[self._resolved(keys, Phases(decode=self.phases.decode)).decode]

    def _resolved(self, keys: Tensor, phases: Phases) -> Phases:
        return resolve(phases, self.axis.size, keys.shape[1], keys.shape[0])


def own_draws(scoring: Scoring, device: torch.device) -> AbstractContextManager[None]:
    """Within, dropout differs from rank to rank; before and after, all ranks' generators are in step.

    They have to be: dropout of the residual stream is drawn by every rank for itself, and must be the same.
    """
    return _own_draws(device) if scoring.dropout else nullcontext()


@contextmanager
def _own_draws(device: torch.device) -> Iterator[None]:
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + dist.get_rank())
        yield
