"""Who ended the job: what a rank knows of the others, and when it is enough to say so."""

from __future__ import annotations

import time
from collections.abc import Sequence

from helix.flight.parting import ranks_in_words
from helix.ranks.failure import RankError
from helix.ranks.heartbeat_link import Peer

BEAT_S = 2.0  # from word to word of a rank
# The thread beats between others' turns at Python's lock, which no single call holds for so long.
SILENT_S = 15.0
# What a rank raised may be the echo of one that died, whose closed connection is seen within this time.
_ECHO_S = 0.5
# One that was told to end may have been with all others, as this one is then within this time.
DOUBT_S = 0.3


class Known:
    """What this rank knows of those that it is connected with.

    Args:
        peers: all others, where it is rank 0; else rank 0.
        first: whether it is.

    Attributes:
        closed: whose connections closed before they had parted.
        raised: what ranks said that they raised, this one's own first.
    """

    def __init__(self, peers: Sequence[Peer], first: bool) -> None:
        self.peers, self.closed, self.raised = list(peers), list[Peer](), list[RankError]()
        self._first, self._waited = first, 0.0  # since when, for what may have been before what was raised

    def note_raised(self, error: RankError) -> None:
        """What the rank of an error raised; the first word of it counts."""
        if all(each.rank != error.rank for each in self.raised):
            self.raised.append(error)

    def silent(self) -> list[Peer]:
        """Who is not heard of, the longest first: those of one host fall silent within the same two beats."""
        found = [each for each in self.peers if not each.parted and each.silent_s >= SILENT_S - 2 * BEAT_S]
        return sorted(found, key=lambda each: -each.silent_s)

    def verdict(self, stopped: bool) -> RankError | None:
        """What ends the job, if anything does.

        Args:
            stopped: whether this rank was told to end itself.
        """
        now = time.monotonic()
        for peer in self.closed:
            if not peer.stopped_at:
                return peer.lost("was lost (its process ended without a word)")
        for peer in self.peers:
            if peer.stopped_at and now - peer.stopped_at >= DOUBT_S and not stopped:
                return peer.lost("was told to end, as by SIGTERM,")
        if (silent := self.silent()) and silent[0].silent_s >= SILENT_S:
            others = ranks_in_words([each.rank for each in silent[1:]])
            more = f"so {'is' if len(silent) == 2 else 'are'} {others}" if silent[1:] else ""
            what = f"was lost (stopped, or cut off: nothing was heard of it for {SILENT_S:.0f} s)"
            return silent[0].lost(what, more)
        if not self._first or not self.raised:
            return None
        self._waited = self._waited or now
        return self.raised[0] if now - self._waited >= _ECHO_S else None
