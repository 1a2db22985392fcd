"""Where the bytes of a step went: to which ranks, and so to which hosts."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch.distributed as dist

from helix.comm.record import Call, Log
from helix.ranks.hosts import Hosts


class Destinations(Log):
    """A log that also counts to whom each collective's bytes went, by the ranks that really took part in it.

    A collective counts as one direct exchange, which it is over gloo (`helix.comm.transport`): a rank sends each
    other one an equal part, or in an all-to-all the rows that it has for it. NCCL may choose other ways, by which
    fewer bytes cross hosts.

    Attributes:
        sent: bytes by "collective/name" and receiving rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, Counter[int]] = defaultdict(Counter)

    def add(self, call: Call, nbytes: int) -> None:
        super().add(call, nbytes)
        own = dist.get_rank()
        rows = call.rows or [1] * len(call.ranks)
        parts = {rank: count for rank, count in zip(call.ranks, rows, strict=True) if rank != own}
        whole = sum(parts.values())
        for rank, count in parts.items():
            if nbytes and count:
                self.sent[call.key][rank] += nbytes * count // whole

    def between(self, hosts: Hosts) -> dict[str, Counter[int]]:
        """Bytes that left this rank's host, by "collective/name" and host."""
        own = hosts.of[dist.get_rank()]
        out: dict[str, Counter[int]] = {}
        for key, receivers in self.sent.items():
            to = Counter[int]()
            for rank, nbytes in receivers.items():
                if hosts.of[rank] != own:
                    to[hosts.of[rank]] += nbytes
            if to:
                out[key] = to
        return out
