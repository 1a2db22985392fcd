"""Counting what the collectives move, for whoever listens.

    with record() as log:
        model(x)
    log.bytes["all_to_all/attention.qkv"], log.seconds["all_to_all/attention.qkv"]

Nobody listening costs one truth test of an empty list per collective.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Log:
    """What was moved while it listened, by "collective/name".

    Attributes:
        bytes: bytes that left this rank (convention of `helix.partition.wire`).
        calls: number of collectives.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds this rank spent inside each collective, waiting for the others included."""
        for key, start, end in self._pending:
            end.synchronize()
            self._seconds[key] += start.elapsed_time(end) / 1e3
        self._pending.clear()
        return self._seconds

    def add(self, key: str, nbytes: int, seconds: float = 0.0, calls: int = 1) -> None:
        self.bytes[key] += nbytes
        self.calls[key] += calls
        self._seconds[key] += seconds

    def add_pending(self, key: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """On CUDA a collective's time is known only once its stream has reached the end event."""
        self._pending.append((key, start, end))


_listeners: list[Log] = []


def listening() -> bool:
    return bool(_listeners)


def tell(key: str, nbytes: int, seconds: float, calls: int = 1) -> None:
    """Tell the listeners of collectives that another library ran."""
    for log in _listeners:
        log.add(key, nbytes, seconds, calls)


@contextmanager
def record() -> Iterator[Log]:
    """Listen to every collective of this process. Listeners nest; each sees everything."""
    log = Log()
    _listeners.append(log)
    try:
        yield log
    finally:
        _listeners.remove(log)


def counted(key: str, nbytes: int, device: torch.device, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run one collective and tell the listeners, if there are any."""
    if not _listeners:
        return run()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = run()
        end.record()
        for log in _listeners:
            log.add(key, nbytes)
            log.add_pending(key, start, end)
        return out
    begin = time.perf_counter()
    out = run()
    elapsed = time.perf_counter() - begin
    for log in _listeners:
        log.add(key, nbytes, elapsed)
    return out
