"""Which ranks run on which host, by what the ranks themselves say at their start."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from helix.config.environment import kernel_namespace
from helix.partition.placement import INSIDE


@dataclass(frozen=True)
class Hosts:
    """The hosts of a launch, and what was made of them.

    Args:
        names: of each host, in the order of its first rank; two of one name are told apart by a number.
        of: the host of each rank, an index into `names`.
        placement: how positions were given to processes: `helix.partition.placement.Placed.taken`.
    """

    names: tuple[str, ...]
    of: tuple[int, ...]
    placement: str = INSIDE

    @property
    def several(self) -> bool:
        return len(self.names) > 1

    def ranks(self) -> dict[str, list[int]]:
        """The ranks on each host, by its name."""
        return {
            name: [rank for rank, host in enumerate(self.of) if host == own] for own, name in enumerate(self.names)
        }

    def where(self, rank: int) -> str:
        """The name of a rank's host."""
        return self.names[self.of[rank]]


def own_host() -> str:
    """What only processes of one host have in common: its name, the kernel's start, and the processes' namespace.

    The name alone will not do: containers of one image may share it. Nor will the kernel: containers on one machine
    reach each other over the network only, as `helix.comm.shared_memory` finds, too.
    """
    return f"{socket.gethostname()} {kernel_namespace()}".strip()


def first_of_host(said: Sequence[str], number: int) -> bool:
    """Whether a rank or process is the first on its host, by what each one's `own_host` said."""
    return said.index(said[number]) == number


def hosts_of(said: Sequence[str], placement: str = INSIDE) -> Hosts:
    """The hosts by what each rank's `own_host` said, in the order of the ranks."""
    distinct = list(dict.fromkeys(said))
    seen: Counter[str] = Counter()
    names = []
    for each in distinct:
        name = each.partition(" ")[0]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    index = {each: number for number, each in enumerate(distinct)}
    return Hosts(tuple(names), tuple(index[each] for each in said), placement)
