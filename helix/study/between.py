"""From what every rank sent to what crossed hosts, and the table of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from helix.flight.parting import runs_of
from helix.partition.placement import ACROSS, INSIDE, RANK_ORDER
from helix.ranks.hosts import Hosts
from helix.study.traffic import BetweenHosts, HostRanks

if TYPE_CHECKING:
    from helix.study.trial import Trial  # knows torch

_SAID = {
    INSIDE: "slices inside hosts",
    ACROSS: "slices across hosts",
    RANK_ORDER: "ranks in the launcher's order, whose hosts cannot hold whole slice groups",
}


def host_ranks(hosts: Hosts) -> HostRanks | None:
    """The hosts for a report; None where there is only one."""
    return HostRanks(hosts.placement, hosts.ranks()) if hosts.several else None


def between_hosts(hosts: Hosts, trials: Sequence[Trial]) -> BetweenHosts | None:
    """What crossed hosts in a step; None where there is only one.

    Args:
        trials: of all ranks, in their order.
    """
    if not hosts.several:
        return None
    executed: Counter[str] = Counter()
    pairs: dict[str, Counter[str]] = defaultdict(Counter)
    for rank, trial in enumerate(trials):
        for key, to in trial.between.items():
            executed[key] += to.total()
            for host, nbytes in to.items():
                pairs[hosts.where(rank)][hosts.names[host]] += nbytes
    forms = trials[0].predicted_between
    return BetweenHosts(
        executed=dict(executed),
        predicted=None if forms is None else {key: each.total() for key, each in forms[hosts.placement].items()},
        pairs={host: dict(to) for host, to in pairs.items()},
        placements=None
        if forms is None
        else {name: sum(each.total() for each in form.values()) for name, form in forms.items()},
    )


def hosts_line(hosts: HostRanks) -> Text:
    """Which ranks are where, as a line of a table's head."""
    where = ", ".join(f"{name} {', '.join(runs_of(ranks))}" for name, ranks in hosts.ranks.items())
    return Text(f"{len(hosts.ranks)} hosts, {_SAID[hosts.placement]}: {where}")


def other_placements(placement: str, between: BetweenHosts) -> Text | None:
    """What would cross hosts in another placement, as a sentence."""
    others = {name: each for name, each in (between.placements or {}).items() if name != placement}
    if not others:
        return None
    said = "; ".join(f"with {_SAID[name]} it would be {nbytes:,}" for name, nbytes in others.items())
    return Text(f"{said[0].upper()}{said[1:]} (predicted).", style="dim")
