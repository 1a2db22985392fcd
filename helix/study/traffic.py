"""What moves between ranks, and between hosts, as `report.json` says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave one rank in one step, by "collective/name": counted as it ran, and from the closed forms.

    `predicted` is None for a method without closed forms.
    """

    executed: Mapping[str, int]
    predicted: Mapping[str, int] | None

    @property
    def agrees(self) -> bool:
        return self.predicted is not None and dict(self.executed) == dict(self.predicted)


@dataclass(frozen=True)
class BetweenHosts(Traffic):
    """As `Traffic`, but the bytes of all ranks that cross from any host to another.

    Collectives count as direct exchanges, which they are over gloo; NCCL may send less between hosts.

    Args:
        pairs: executed, by sending and receiving host.
        placements: predicted in all, for each placement that the hosts allow; None as `predicted`.
    """

    pairs: Mapping[str, Mapping[str, int]]
    placements: Mapping[str, int] | None


@dataclass(frozen=True)
class HostRanks:
    """Which ranks ran on which host.

    Args:
        placement: what `parallel.placement` came to: slices_inside, slices_across or rank_order.
        ranks: on each host, by its name.
    """

    placement: str
    ranks: Mapping[str, Sequence[int]]
