"""Joining what was traced of a pass with what the closed forms say of it."""

from __future__ import annotations

from collections.abc import Mapping

from helix.dryrun.costs import times
from helix.dryrun.figures import Collective, Pair, Pass
from helix.dryrun.tracer import Trace
from helix.planner.machine import Machine
from helix.planner.seconds import Seconds


def assess(
    name: str,
    trace: Trace,
    machine: Machine | None,
    *,
    predicted: Mapping[str, int] | None,
    flops: int | None,
    activations: int | None,
    seconds: Seconds | None,
) -> Pass:
    """A pass's figures in pairs; the arguments after the machine are those of the forms, None where there are none."""
    keys = dict.fromkeys([*trace.calls, *(predicted or {})])
    collectives = {
        key: Collective(
            trace.calls.get(key, 0),
            Pair(trace.bytes.get(key, 0), None if predicted is None else predicted.get(key, 0)),
        )
        for key in keys
    }
    return Pass(
        name=name,
        collectives=collectives,
        flops=Pair(trace.flops, flops),
        activations=Pair(trace.peak, activations),
        buffers=trace.buffers,
        seconds=None if machine is None else times(trace.operators, machine),
        predicted_seconds=None if machine is None else seconds,
    )
