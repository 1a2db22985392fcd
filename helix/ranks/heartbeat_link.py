"""The heartbeat's connections, lines of JSON from ranks and perhaps from strangers, and what is known of a rank."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from typing import Any

from helix.flight import activity
from helix.ranks.failure import RankError

LINE_BYTES, FIRST_BYTES = 1 << 20, 1 << 10  # of a rank's line; of who has not said yet who it is
_SEND_S = 2.0


def serve(ranks: int, alone: bool) -> tuple[socket.socket, tuple[str, int]]:
    """Where ranks connect: on loopback where all are of one host, else where the launcher says that rank 0 is."""
    dual = not alone and socket.has_dualstack_ipv6()
    family, here = socket.AF_INET6 if dual else socket.AF_INET, "127.0.0.1" if alone else ""
    server = socket.create_server((here, 0), family=family, dualstack_ipv6=dual, backlog=ranks)
    return server, (here or os.environ["MASTER_ADDR"], server.getsockname()[1])


class Line:
    """A connection on which each line is a JSON object of at most `most` bytes."""

    def __init__(self, link: socket.socket, most: int = LINE_BYTES) -> None:
        link.settimeout(_SEND_S)  # of one whose rank does not read; it is silent, too
        self.link, self.most, self._rest, self._broken = link, most, b"", False

    def fileno(self) -> int:
        return self.link.fileno()

    def send(self, words: dict[str, Any]) -> None:
        """Say something, if the other still reads."""
        if self._broken:
            return
        try:
            self.link.sendall(json.dumps(words).encode() + b"\n")
        except OSError:  # that it is closed, reading tells; what came after half a line could not be read
            self._broken = True

    def read(self) -> list[dict[str, Any]] | None:
        """What has come; None if it is closed, or no rank's."""
        try:
            if not (got := self.link.recv(1 << 16)):
                return None
            *lines, self._rest = (self._rest + got).split(b"\n")
            if max(map(len, (*lines, self._rest))) > self.most:
                return None
            words = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        return words if all(isinstance(each, dict) for each in words) else None


@dataclass
class Peer:
    """Another rank, as far as it is known here; `silent_s` counts only while this process runs.

    `stopped_at` is when it said that it was told to end; 0 if it was not.
    """

    number: int
    host: str
    rank: int
    pid: int = 0
    phase: str = activity.START
    last: str = ""
    line: Line | None = None
    silent_s: float = 0.0
    parted: bool = False
    stopped_at: float = 0.0

    def lost(self, what: str, more: str = "") -> RankError:
        last = f"its last collective was {self.last}" if self.last else ""
        return RankError(self.rank, self.host, self.phase, what, ", ".join(filter(None, (more, last))))
