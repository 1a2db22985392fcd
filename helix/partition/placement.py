"""Which process takes which position of the grid, where the processes run on several hosts.

A position is what the rest of Helix calls a rank: (data, stage, i, j) with the slice j innermost, so that the m ranks
of a slice group are neighbours. Launchers number processes as they like: torchrun host by host, SLURM's cyclic
distribution in turns. So each process is given a position anew, by the host that it runs on:

    hosts of processes 0 .. 3   a b a b       m = 2, n = 2
    slices_inside               positions 0 1 2 3 want hosts a a b b: processes 0 2 | 1 3 are the slice groups
    slices_across               positions 0 1 2 3 want hosts a b a b: processes 0 1 | 2 3

Process 0 is position 0 in every placement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from helix.partition.grid import PartitionError, divisors

AUTO, INSIDE, ACROSS = "auto", "slices_inside", "slices_across"
PLACEMENTS = (AUTO, INSIDE, ACROSS)
RANK_ORDER = "rank_order"  # what `auto` comes to where slice groups cannot be kept inside hosts


class Placed(NamedTuple):
    """A placement that has been made.

    Args:
        taken: INSIDE, ACROSS or RANK_ORDER.
        positions: of each process, by the launcher's number.
    """

    taken: str
    positions: tuple[int, ...]


def place(placement: str, hosts: Sequence[int], m: int) -> Placed:
    """Give each process a position.

    Args:
        placement: one of `PLACEMENTS`.
        hosts: of each process, by the launcher's number; any numbers that name them.
        m: ranks of a slice group.

    Raises:
        PartitionError: if `slices_inside` or `slices_across` cannot be kept on these hosts, with what can.
    """
    counts = Counter(hosts)  # in the order in which their first processes come
    reason = _refusal(placement, list(counts.values()), m)
    if reason and placement == AUTO:
        return Placed(RANK_ORDER, tuple(range(len(hosts))))
    if reason:
        raise PartitionError(
            f"parallel.placement={placement} {reason}; {_instead(placement, list(counts.values()), m)}"
        )
    taken = ACROSS if placement == ACROSS else INSIDE
    wanted = _wanted(taken, counts, m)
    # Each host's processes, in order, to the positions that want this host, in order.
    free = {host: [position for position, each in enumerate(wanted) if each == host] for host in counts}
    return Placed(taken, tuple(free[host].pop(0) for host in hosts))


def hosts_placed(placement: str, hosts: Sequence[int], m: int) -> list[int]:
    """The host of each position; see `place`."""
    return [host for _, host in sorted(zip(place(placement, hosts, m).positions, hosts, strict=True))]


def check_hosts(placement: str, ranks: int, hosts: int, m: int) -> None:
    """Check what only the number of hosts can say, before ranks start.

    Raises:
        PartitionError: if no spread of the ranks over so many hosts keeps the placement.
    """
    even = [ranks // hosts] * hosts
    reason = None
    if placement == ACROSS:
        reason = _refusal(ACROSS, even, m)
        if reason is None and ranks % hosts:
            reason = f"needs equally many ranks on every host, and {hosts} hosts do not divide {ranks} ranks"
    elif placement == INSIDE and ranks // m < hosts:
        reason = (
            f"needs a slice group on every host, and {ranks} ranks are {ranks // m} groups of m={m}, for {hosts} hosts"
        )
    if reason:
        raise PartitionError(f"parallel.placement={placement} {reason}; {_instead(placement, even, m)}")


def _wanted(taken: str, counts: Counter[int], m: int) -> list[int]:
    """The host that each position wants."""
    if taken == INSIDE:
        return list(counts.elements())
    slices = [host for host in counts for _ in range(m // len(counts))]  # of the slices 0 .. m - 1 of every group
    return slices * (counts.total() // m)


def _refusal(placement: str, counts: list[int], m: int) -> str | None:
    """Why hosts of so many ranks each cannot keep the placement, if they cannot."""
    if placement == ACROSS:
        if m == 1:
            return "spreads slice groups over hosts, and m=1 has none"
        if len(counts) == 1:
            return "spreads slice groups over hosts, and all ranks are on one"
        if len(set(counts)) > 1:
            return f"needs equally many ranks on every host, not {_list(counts)}"
        if m % len(counts):
            return f"spreads the m={m} ranks of each slice group evenly, and {len(counts)} hosts do not divide them"
        return None
    odd = [count for count in counts if count % m]
    return (
        f"needs whole slice groups on every host, and m={m} does not divide a host's {odd[0]} ranks" if odd else None
    )


def _instead(placement: str, counts: list[int], m: int) -> str:
    """The legal choices, where `placement` is none."""
    legal = [AUTO, *(each for each in (INSIDE, ACROSS) if _refusal(each, counts, m) is None)]
    said = f"legal here: parallel.placement={' or '.join(legal)}"
    ranks, hosts = sum(counts), len(counts)
    sizes = [size for size in divisors(ranks) if size != m and _refusal(placement, counts, size) is None]
    return f"{said}, or m of {_list(sizes)}" if sizes and hosts > 1 else said


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
