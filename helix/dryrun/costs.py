"""How long a machine takes for what was traced: each operator and collective by `Machine`, one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from helix.dryrun.operators import ATTENTION, EXCHANGE, MATMUL, Operator
from helix.dryrun.tracer import Begin, End, Trace
from helix.planner.machine import Machine


def seconds_of(one: Operator, machine: Machine) -> float:
    """A roofline of the operator's own FLOPs and bytes; of a collective, its group's place among the islands."""
    if one.kind == MATMUL:
        return machine.matmul(one.flops, one.nbytes, one.width)
    if one.kind == ATTENTION:
        return machine.attention(one.flops, one.nbytes, one.width, one.length)
    if one.kind == EXCHANGE:
        return machine.collective(one.name.partition("/")[0], one.nbytes, len(one.ranks), stride_of(one.ranks))
    return machine.stream(one.nbytes)


def stride_of(ranks: tuple[int, ...]) -> int:
    """How far apart the ranks of a mesh axis are."""
    return ranks[1] - ranks[0] if len(ranks) > 1 else 1


def times(operators: Iterable[Operator], machine: Machine) -> dict[str, dict[str, float]]:
    """Seconds by part of the model, and by kind in each."""
    out: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in operators:
        out[one.part][one.kind] += seconds_of(one, machine)
    return {part: dict(kinds) for part, kinds in out.items()}


@dataclass(frozen=True)
class Span:
    """Something that takes from `start_s` to `end_s` of a pass: an operator, or a phase that holds others.

    Args:
        operator: None of a phase.
    """

    name: str
    start_s: float
    end_s: float
    operator: Operator | None = None


def spans(trace: Trace, machine: Machine) -> Iterator[Span]:
    """A pass on the machine's clock; a phase comes after what it holds."""
    now = 0.0
    begun: list[tuple[str, float]] = []
    for entry in trace.entries:
        if isinstance(entry, Begin):
            begun.append((entry.name, now))
        elif isinstance(entry, End):
            name, start = begun.pop()
            yield Span(name, start, now)
        else:
            start, now = now, now + seconds_of(entry, machine)
            yield Span(entry.name, start, now, entry)
