"""Who runs which step when: methods of one launch take turns, so that a drift of the machine falls on all alike.

A run is `warmup` steps of each method, one recorded pass, and `iterations` timed passes. Every second timed pass goes
through the methods backwards (A B C, C B A: "ABBA"), so that none always follows the same neighbour. In the
recorded pass collectives are counted and their spans kept, which the timed ones do without; before them, it is one
more step to warm up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    WARMUP = "warm-up"
    TIMED = "timed"
    RECORDED = "recorded"


@dataclass(frozen=True)
class Turn:
    """One step of one method.

    Args:
        batch: number of the pass over all runs, which says which tokens the step is given: all methods of a pass
            compute on the same ones.
        ends_pass: whether this is the last method of its pass.
    """

    method: str
    kind: Kind
    run: int
    batch: int
    ends_pass: bool


def take_turns(methods: Sequence[str], warmup: int, iterations: int, runs: int) -> Iterator[Turn]:
    """The turns of all runs, in order; the same on every rank."""
    kinds = [Kind.WARMUP] * warmup + [Kind.RECORDED] + [Kind.TIMED] * iterations
    timed = 0
    for run in range(runs):
        for step, kind in enumerate(kinds):
            order = list(methods) if timed % 2 == 0 else list(methods)[::-1]
            timed += kind is Kind.TIMED
            for name in order:
                yield Turn(name, kind, run, run * len(kinds) + step, ends_pass=name == order[-1])
