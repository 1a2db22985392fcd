"""Bytes of the tensors that are alive, and their peak, by the life of their storages: no allocator is asked."""

from __future__ import annotations

import weakref
from collections import Counter

from torch import Tensor


class Live:
    """Every storage that was shown to it, until it is freed.

    Attributes:
        now: bytes alive, by what they were made for.
        peak: the most that were alive together since `begin`, and `at_peak` what they were made for then.
    """

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.peak, self.at_peak = 0, Counter[str]()
        self._known: dict[int, weakref.ref[object]] = {}

    @property
    def total(self) -> int:
        return sum(self.now.values())

    def begin(self) -> int:
        """Forget the peak so far; returns what is alive now."""
        self.peak, self.at_peak = self.total, Counter(self.now)
        return self.peak

    def see(self, x: Tensor, what: str) -> None:
        """A tensor that an operator has returned; its storage counts once."""
        storage = x.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            self._known.pop(key, None)
            self.now[what] -= nbytes

        self._known[key] = weakref.ref(storage, freed)
        self.now[what] += nbytes
        if (total := self.total) > self.peak:
            self.peak, self.at_peak = total, Counter(self.now)
