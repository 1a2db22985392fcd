"""Counting what the collectives move and how long they take, for whoever listens; naming them in a profile.

    with record() as log:
        model(x)
    log.bytes["all_to_all/attention.qkv"], log.seconds["all_to_all/attention.qkv"], log.spans

Nobody listening and no profiler running costs an entry of the flight record (`helix.flight.ring`) per collective, and
two truth tests per phase.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch.autograd import profiler

from helix.comm.mesh import Axis
from helix.flight import checking, ring
from helix.flight.checking import Rows


class Span(NamedTuple):
    """One collective as one of its ranks saw it; times are seconds of this machine's monotonic clock.

    Args:
        key: "collective/name".
        ranks: global ranks of its group; of a point-to-point transfer (source, destination).
        start_s: when this rank came to it.
        end_s: when it was complete here.
        blocked_s: from when until end_s this rank did nothing else. start_s, but for transfers that run in the
            background until the rank waits for them.
    """

    key: str
    ranks: tuple[int, ...]
    start_s: float
    end_s: float
    blocked_s: float


class Call:
    """One collective of this rank, from the moment that the rank comes to it.

    Attributes:
        rows: that each of the ranks is sent of what leaves this one; None if all get equally many.
    """

    def __init__(
        self, key: str, ranks: tuple[int, ...], device: torch.device, rows: Sequence[int] | None = None
    ) -> None:
        self.key, self.ranks, self.rows = key, ranks, rows
        self._cuda = device.type == "cuda"
        self.start = self.blocked = self.end = self._now()

    def block(self) -> None:
        """From now on the rank only waits for it."""
        self.blocked = self._now()

    def finish(self) -> None:
        self.end = self._now()

    def _now(self) -> float | torch.cuda.Event:
        """On CUDA what counts is when the stream gets here, which is known only later."""
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self, clock: _StreamClock) -> None:
        """Replace events by the times at which the stream reached them."""
        if self._cuda:
            self.start, self.blocked, self.end = (clock.time(mark) for mark in (self.start, self.blocked, self.end))
            self._cuda = False

    def span(self) -> Span:
        start, blocked, end = self.start, self.blocked, self.end
        assert isinstance(start, float)
        assert isinstance(blocked, float)
        assert isinstance(end, float)
        # A call that was never waited for blocked nobody: its end is its start.
        return Span(self.key, self.ranks, start, end, min(blocked, end))


class _StreamClock:
    """The monotonic time of CUDA events, by an event of now whose time the host knows."""

    def __init__(self) -> None:
        self._base: torch.cuda.Event | None = None
        self._base_s = 0.0

    def time(self, mark: float | torch.cuda.Event) -> float:
        if isinstance(mark, float):
            return mark
        if self._base is None:
            self._base = torch.cuda.Event(enable_timing=True)
            self._base.record()
            self._base.synchronize()
            self._base_s = time.monotonic()
        mark.synchronize()  # it may be on another stream
        return self._base_s - mark.elapsed_time(self._base) / 1e3


class Log:
    """What was moved while it listened, by "collective/name".

    Attributes:
        bytes: bytes that left this rank (convention of `helix.partition.wire`).
        calls: number of collectives.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self._calls: list[Call] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds this rank spent inside each collective, waiting for the others included."""
        out: dict[str, float] = defaultdict(float)
        for span in self.spans:
            out[span.key] += span.end_s - span.blocked_s
        return out

    @property
    def spans(self) -> list[Span]:
        """Every collective, in the order in which this rank came to them. On CUDA this waits for the stream."""
        clock = _StreamClock()
        for call in self._calls:
            call.settle(clock)
        return [call.span() for call in self._calls]

    def add(self, call: Call, nbytes: int) -> None:
        self.bytes[call.key] += nbytes
        self.calls[call.key] += 1
        self._calls.append(call)


_listeners: list[Log] = []
_watchers: list[Callable[[str], AbstractContextManager[object]]] = []
_telling = False


def listening() -> bool:
    return bool(_listeners)


@contextmanager
def record(log: Log | None = None) -> Iterator[Log]:
    """Listen to every collective of this process. Listeners nest; each sees everything.

    Args:
        log: who listens; a new one if None.
    """
    log = Log() if log is None else log
    _listeners.append(log)
    try:
        yield log
    finally:
        _listeners.remove(log)


def being_told() -> bool:
    """Whether what runs now is inside a collective that the listeners hear of already."""
    return _telling


@contextmanager
def telling(
    key: str, nbytes: int, ranks: Sequence[int], device: torch.device, rows: Sequence[int] | None = None
) -> Iterator[Call]:
    """Tell the listeners of the collective that the body starts.

    The body may call `finish` itself, when it has waited for the collective, or leave that for later.
    """
    global _telling
    call = Call(key, tuple(ranks), device, rows)
    for log in _listeners:
        log.add(call, nbytes)
    outer, _telling = _telling, True
    try:
        yield call
    finally:
        _telling = outer


def counted(
    key: str, nbytes: int, x: torch.Tensor, axis: Axis, run: Callable[[], torch.Tensor], rows: Rows | None = None
) -> torch.Tensor:
    """Run one collective of the axis on x, for the flight record, the listeners and the profiler, if there are any.

    Args:
        rows: of dim 0, sent to and received from each rank, where those may differ.

    Raises:
        Disagreement: in debug mode, before it runs, if a rank does not come, or with another one.
    """
    entry = ring.come(key, axis.name, axis.group, nbytes, x.shape, x.dtype)
    checks = checking.active()
    if checks is None and not _listeners:
        with phase(key):
            out = run()
    else:
        if checks is not None:
            checks.meet(entry, rows)
        sent = None if rows is None else rows[0]
        with telling(key, nbytes, entry.course.ranks, x.device, sent) as call, phase(key):
            out = run()
            call.finish()
    entry.end(x.device)
    return out


_UNNAMED: AbstractContextManager[None] = nullcontext()


@contextmanager
def watch(watcher: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """Have `watcher` give what is entered around every phase that begins in the body, by the phase's name."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def phase(name: str) -> AbstractContextManager[object]:
    """Name what the body computes in a profile (`helix.study.profile`), if one is being taken, and to who watches."""
    if _watchers:
        return _watchers[-1](name)
    # PyTorch's own flag for this question; its public record_function costs microseconds also when nobody asks.
    return profiler.record_function(name) if profiler._is_profiler_enabled else _UNNAMED
