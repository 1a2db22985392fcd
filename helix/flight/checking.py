"""What debug mode asks before a collective: have all of its ranks come, and all to the same one? Through the store.

Not through the device's own groups, which a rank that differs leaves stuck (gloo aborts the process of one that
receives more than it has room for): so it is one for gloo, NCCL and shared memory, and what is refused has not begun.
What is wrong is one sentence, the same on every rank that waits anywhere. Told apart are

* another collective, shape, dtype or share of an all-to-all under the same number: at once;
* ranks that wait for each other in different groups: at once, since a circle of waiting ranks never ends;
* a rank whose work has ended: at once; one that comes to nothing, but may be computing: after `limit_s`.

PyTorch's own check (TORCH_DISTRIBUTED_DEBUG=DETAIL) sees no shared memory, compares no shares of an all-to-all, knows
neither names nor axes, and for a collective that was skipped names one that nobody called (paper/LOG.md, 2026-11-22).
"""

from __future__ import annotations

import itertools
import json
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from helix.flight import ring
from helix.flight.activity import current
from helix.flight.parting import parted, ranks_in_words, rows_parted
from helix.flight.ring import Entry
from helix.flight.waiting import Spot, circle

# One word of the store holds how many have come, and above these bits the sum of what they have come with.
_BITS = 12
_GIVEN_UP = 2 ** (_BITS - 1)  # added to how many have come, once one of them no longer waits
_SHARE = 2**24  # digests of shares are below, so that a sum of 1,024 ranks fits the word
_POLL_S = (5e-5, 0.02)  # first, and at most
_LOOK_S = 0.3  # how often a rank that waits looks where the others are
_sessions = itertools.count()
_active: list[Checks] = []

Rows = tuple[Sequence[int], Sequence[int]]


class Disagreement(RuntimeError):
    """Ranks that came to different collectives, or one that does not come."""


def active() -> Checks | None:
    """The checks that hold now, if any do."""
    return _active[-1] if _active else None


class Checks:
    """The checks of one stretch of work, which all ranks of the default group begin together.

    Args:
        limit_s: seconds after which a rank that comes to nothing is given up.
    """

    def __init__(self, limit_s: float) -> None:
        # A connection of its own: a heartbeat must not wait for one that waits.
        store: Any = dist.PrefixStore(f"helix-checks-{next(_sessions)}", _get_default_store())
        self._store: dist.Store = store.clone()  # its type does not know this method
        self._limit_s, self._known = limit_s, set[str]()
        self._spot = Spot(dist.get_rank(), socket.gethostname())
        self._say(self._spot)
        ring.begin_anew()

    def __enter__(self) -> None:
        _active.append(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Tell the ranks that still wait how this one's work ended."""
        _active.remove(self)
        words = " ".join(f"{error}".split())[:200]
        self._say(replace(self._spot, end="returned" if kind is None else f"raised {kind.__name__}: {words}"))

    def meet(self, entry: Entry, rows: Rows | None = None) -> None:
        """Wait until all ranks of a collective have come to it, with the same tensor.

        Args:
            rows: of dim 0, that this rank sends to each of the others and receives from each. They have to be what the
                others receive and send; the first dim itself is then each rank's own.

        Raises:
            Disagreement: on every rank that waits, with one sentence.
        """
        course, what = entry.course, _what(entry, rows)
        self._come(entry, what, rows)
        key, size = f"{course.name}/{entry.number}", len(course.ranks)
        mark = zlib.crc32(what.encode())
        found = self._store.add(key, 1 + (mark + _balance(self._spot.rank, course.ranks, rows) << _BITS))

        def all_here() -> bool:
            nonlocal found
            found = found if found % 2**_BITS == size else self._store.add(key, 0)
            if found % 2**_BITS > size:
                self._heed()
            return found % 2**_BITS == size

        try:
            self._until(entry, all_here, course.ranks)
        except Disagreement:
            if self._give_up(key, size):
                raise
            all_here()  # the last has come meanwhile, and the others go on
        if found >> _BITS != mark * size:
            self._tell_apart(entry, rows is not None)
        if self._spot.rank == course.ranks[0]:
            self._store.delete_key(f"{course.name}/{entry.number - 1}")  # all that are here have left it

    def send(self, entry: Entry) -> None:
        """Say what is being sent; the receiver compares. `arrive` waits for it."""
        self._come(entry, entry.what, None, meets=False)
        self._store.set(f"{entry.course.name}/{entry.number}", entry.what)

    def arrive(self, entry: Entry) -> None:
        """Wait until a transfer's receiver has come to it."""
        taken = f"{entry.course.name}/{entry.number}/taken"
        self._until(entry, lambda: self._store.check([taken]), entry.course.ranks[1:])
        self._store.delete_key(taken)

    def receive(self, entry: Entry) -> None:
        """Wait until a transfer's sender has come to it, with the same tensor."""
        self._come(entry, entry.what, None, meets=False)
        card = f"{entry.course.name}/{entry.number}"
        self._until(entry, lambda: self._store.check([card]), entry.course.ranks[:1])
        sent = self._store.get(card).decode()
        if sent.partition("/")[2] != entry.what.partition("/")[2]:
            self._fail(parted(entry.place, dict(zip(entry.course.ranks, (sent, entry.what), strict=True)))[1])
        self._store.delete_key(card)
        self._store.set(f"{card}/taken", "")

    def _come(self, entry: Entry, what: str, rows: Rows | None, meets: bool = True) -> None:
        course = entry.course
        self._spot = Spot(
            self._spot.rank, self._spot.host, current(), course.name, entry.number, entry.axis, course.ranks, what,
            meets, (list(rows[0]), list(rows[1])) if rows else None,
        )  # fmt: skip
        self._say(self._spot)

    def _say(self, spot: Spot) -> None:
        self._store.set(f"at/{spot.rank}", json.dumps(asdict(spot)))

    def _until(self, entry: Entry, done: Callable[[], bool], of: Sequence[int]) -> None:
        """Wait for other ranks, and look now and then what keeps them."""
        began = looked = time.monotonic()
        pause = _POLL_S[0]
        while not done():
            time.sleep(pause)
            pause, now = min(2 * pause, _POLL_S[1]), time.monotonic()
            if now - looked >= _LOOK_S:
                self._look(entry, of, now - began)
                looked = now

    def _give_up(self, key: str, size: int) -> bool:
        """Leave a collective, unless all have come: then some have begun it, and would wait for this rank for ever."""
        while True:
            held = self._store.get(key)
            came = int(held) % 2**_BITS
            if came >= size:
                return came > size
            left = str(int(held) + _GIVEN_UP)
            if self._store.compare_set(key, held.decode(), left).decode() == left:
                return True

    def _heed(self) -> None:
        """Raise what another rank has found."""
        if self._store.check(["verdict"]):
            raise Disagreement(self._store.get("verdict").decode())

    def _look(self, entry: Entry, of: Sequence[int], waited_s: float) -> None:
        self._heed()
        spots = self._spots()
        place = f"{entry.place}, {entry.what}"
        missing = [rank for rank in of if rank not in spots or not self._is_at(spots[rank], entry)]
        here = [rank for rank in entry.course.ranks if rank not in missing]
        wait = f"where {ranks_in_words(here)} wait{'s' * (len(here) == 1)}"
        for rank in missing:
            if rank in spots and spots[rank].end:
                end = f"{spots[rank].end}{_where([rank], spots)}"
                self._fail(f"rank {rank} has {end}, and does not come to {place}, {wait}")
        if found := circle(spots, self._spot.rank, self._waits):
            self._fail(_circular([spots[rank] for rank in found]))
        if missing and waited_s > self._limit_s:
            there = "; ".join(_last(rank, spots) for rank in missing[:4])
            verb = "has" if len(missing) == 1 else "have"
            who = f"{ranks_in_words(missing)} {verb} not come to {place} within {self._limit_s:.0f} s"
            self._fail(f"{who}, {wait}; {there}")

    @staticmethod
    def _is_at(spot: Spot, entry: Entry) -> bool:
        return spot.meets and (spot.course, spot.number) == (entry.course.name, entry.number)

    def _waits(self, spot: Spot) -> bool:
        """Whether a rank is still waiting for others where it last said to be."""
        if not spot.meets or spot.end:
            return False
        key = f"{spot.course}/{spot.number}"
        if not self._store.check([key]):  # all have left it; asking for the count would make a new one
            return False
        return 0 < self._store.add(key, 0) % 2**_BITS < len(spot.ranks)

    def _spots(self) -> dict[int, Spot]:
        """Where all ranks are that have said so."""
        keys = [f"at/{rank}" for rank in range(dist.get_world_size())]
        self._known |= {key for key in keys if key not in self._known and self._store.check([key])}
        known = [key for key in keys if key in self._known]
        found = (Spot.of(json.loads(each)) for each in self._store.multi_get(known))
        return {spot.rank: spot for spot in found}

    def _tell_apart(self, entry: Entry, rows: bool) -> NoReturn:
        """Say who came with what; all have said it, and go no further."""
        spots = self._spots()
        here = {rank: spots[rank] for rank in entry.course.ranks}
        came = {rank: spot.what for rank, spot in here.items()}
        if rows and len(set(came.values())) == 1:
            odd, said = rows_parted(entry.place, entry.what, {rank: spot.rows for rank, spot in here.items()})
        else:
            odd, said = parted(entry.place, came)
        self._fail(said + _where(odd, spots))

    def _fail(self, sentence: str) -> NoReturn:
        """Raise what was said first, on whichever rank."""
        raise Disagreement(self._store.compare_set("verdict", "", sentence).decode())


def _what(entry: Entry, rows: Rows | None) -> str:
    """What all ranks have to come with: of an all-to-all whose shares differ, all but the first dim."""
    if rows is None:
        return entry.what
    return f"{entry.key} [{', '.join(['*', *map(str, (entry.shape or ())[1:])])}] {entry.type}".rstrip()


def _balance(rank: int, ranks: Sequence[int], rows: Rows | None) -> int:
    """What comes to 0 over all ranks if each sends what the other receives."""
    if rows is None:
        return 0
    sent = sum(zlib.crc32(f"{rank}>{to}:{count}".encode()) % _SHARE for to, count in zip(ranks, rows[0], strict=True))
    due = sum(zlib.crc32(f"{of}>{rank}:{count}".encode()) % _SHARE for of, count in zip(ranks, rows[1], strict=True))
    return sent - due


def _last(rank: int, spots: Mapping[int, Spot]) -> str:
    """Where a rank is that does not come."""
    spot = spots.get(rank)
    if spot is None or not spot.number:
        return f"rank {rank} has come to no collective{_where([rank], spots)}"
    return f"the last that rank {rank} came to is {spot.place}{_where([rank], spots)}"


def _where(ranks: Sequence[int], spots: Mapping[int, Spot]) -> str:
    """Hosts, if there are several, and phases of ranks that are named."""
    hosts = len({spot.host for spot in spots.values()}) > 1
    named = [spots[rank] for rank in ranks[:4] if rank in spots]
    words = [f"{spot.phase} on host {spot.host}" if hosts else spot.phase for spot in named]
    return f" (during {'; '.join(dict.fromkeys(words))})" if words else ""


def _circular(waiting: Sequence[Spot]) -> str:
    waits = (
        f"rank {spot.rank} waits for rank {after.rank} in {spot.place}"
        for spot, after in zip(waiting, [*waiting[1:], waiting[0]], strict=True)
    )
    return f"ranks wait for each other in a circle: {'; '.join(waits)}"
