"""Memory for keys and values that come token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Room for so many of a rank's tokens is made at a time: each is copied once in so many steps, not in every step,
# and what is reserved and not used is known.
SPARE_TOKENS = 64


class Store:
    """Keys and values of one rank's tokens, in room that grows by `SPARE_TOKENS` at a time.

    Args:
        none: no keys[B, K@head, 0, D], or this rank's part of it, in the form of those to come; values are alike.

    Attributes:
        keys, values: what is held, [B, K@head, S, D] or its part.
    """

    def __init__(self, none: Tensor) -> None:
        self._room = torch.stack([none.detach()] * 2)
        self._start = self._stop = 0
        self._show()

    def _show(self) -> None:
        # One call for both; where no token came or went, what a call gets is what the one before it got.
        self.keys, self.values = self._room[:, :, :, self._start : self._stop].unbind()

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the last so many tokens."""
        if count == self._stop - self._start:
            return self.keys, self.values
        keys, values = self._room[:, :, :, self._stop - count : self._stop].unbind()
        return keys, values

    @property
    def held_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def reserved_bytes(self) -> int:
        return self._room.nbytes

    def append(self, keys: Tensor, values: Tensor) -> None:
        count = keys.shape[2]
        if torch.is_grad_enabled() and (keys.requires_grad or self._room.requires_grad):
            # A gradient goes through what is kept, so it is not written over; also none of the tokens is a part of
            # the graph, so that this rank's backward takes part in the collectives.
            held = self._room[:, :, :, self._start : self._stop]
            self._room = torch.cat([held, torch.stack([keys, values])], 3)
            self._start, self._stop = 0, self._room.shape[3]
        elif count:
            if self._stop + count > self._room.shape[3] or self._is_closed():
                self._grow(count)
            self._room[0, :, :, self._stop : self._stop + count] = keys
            self._room[1, :, :, self._stop : self._stop + count] = values
            self._stop += count
        else:
            return
        self._show()

    def drop(self, first: int = 0, last: int = 0) -> None:
        """Forget the first or the last so many."""
        if first or last:
            self._start, self._stop = self._start + first, self._stop - last
            self._show()

    def change(self, samples: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held, and the room around it, by what a function makes of it, sample by sample."""
        self._room = samples(self._room.transpose(0, 1)).transpose(0, 1)
        self._show()

    def _is_closed(self) -> bool:
        """Whether the room is of torch's inference mode, in which it can be written only there, or has a history."""
        return self._room.requires_grad or (self._room.is_inference() and not torch.is_inference_mode_enabled())

    def _grow(self, count: int) -> None:
        held = self._room[:, :, :, self._start : self._stop]
        both, batch, heads, kept, dim = held.shape
        self._room = held.new_empty(both, batch, heads, kept + count + SPARE_TOKENS, dim)
        self._room[:, :, :, :kept] = held
        self._start, self._stop = 0, kept
