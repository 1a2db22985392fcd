"""What `parallel=auto` has come to: for the terminal before a run, and for its report beside what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from helix.config.words import figure, size
from helix.planner.band import few_words
from helix.planner.plan import Plan
from helix.planner.work import Estimate


@dataclass(frozen=True)
class Predicted:
    """What the time and memory model says of one layout.

    Args:
        step_ms: of a forward pass, or of a training's batch, forward and backward; of generation as tpot_ms.
        step_share: by what the time goes to, of a step; of generation, of all of it.
        ttft_ms, tpot_ms: of generation: to the first token, and for each after it.
        memory_bytes_per_rank: of the fullest rank, by what holds it, and their total.
    """

    name: str
    step_ms: float
    tokens_per_s: float
    step_share: dict[str, float]
    memory_bytes_per_rank: dict[str, int]
    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True)
class Chosen:
    """A choice, and why it was made.

    Args:
        goal: what the layout is the best in.
        devices: that every layout considered has.
        hardware: the file whose figures were taken.
        work: what it was chosen for: mode, batch, length, new_tokens and precision.
        considered: layouts whose dims are legal, schedules and microbatches counted; fitting: those of them worth
            costing that fit in memory.
        predicted: of the layout that was chosen; runner_up: of the best one with another name, if there is one.
        reasons: in words, the most important first.
        error_share: part by which the model was off measurements on this hardware, of forward passes at the median;
            None if nobody has measured.
        band: the same in words.
    """

    goal: str
    devices: int
    hardware: str
    work: dict[str, Any]
    considered: int
    fitting: int
    predicted: Predicted
    runner_up: Predicted | None
    reasons: tuple[str, ...]
    error_share: float | None
    band: str


def chosen(plan: Plan) -> Chosen:
    """A plan, as far as a run's report is to tell of it."""
    return Chosen(
        goal=plan.goal,
        devices=plan.devices,
        hardware=plan.hardware,
        work=asdict(plan.work),
        considered=plan.considered,
        fitting=plan.fitting,
        predicted=_predicted(plan.best),
        runner_up=None if plan.runner_up is None else _predicted(plan.runner_up),
        reasons=plan.reasons,
        error_share=plan.error,
        band=plan.band,
    )


def told(one: Chosen) -> str:
    """Two lines: what was chosen, at what figure and before whom; and why."""
    devices = f"{one.devices} device{'s' if one.devices > 1 else ''} of hardware={one.hardware}"
    error = few_words(one.error_share, one.work["mode"])
    memory = "" if one.goal == "memory" else f", {_figure('memory', one.predicted)}"
    second = "" if one.runner_up is None else f"; next {one.runner_up.name}, {_figure(one.goal, one.runner_up)}"
    why = [reason for reason in one.reasons[:2] if one.runner_up is None or one.runner_up.name not in reason]
    return (
        f"parallel=auto: {one.predicted.name} for {one.goal} on {devices}: {_figure(one.goal, one.predicted)}{memory} "
        f"predicted ({error}){second}\n{' '.join(why)}"
    )


def compared(one: Chosen, measured_ms: float) -> str:
    """A line for the end of a run: its step beside what was predicted.

    Args:
        measured_ms: as `Predicted.step_ms`.
    """
    predicted = one.predicted.step_ms
    what = "a token's step" if one.predicted.tpot_ms is not None else "a step"
    off = predicted / measured_ms - 1
    return (
        f"parallel=auto chose {one.predicted.name} for {one.goal}: {what} predicted {figure(predicted)} ms, measured "
        f"{figure(measured_ms)} ms ({off:+.0%})."
    )


def _figure(goal: str, one: Predicted) -> str:
    """The figure that a goal is about."""
    if goal == "memory":
        return f"{size(one.memory_bytes_per_rank['total'])} a rank"
    if one.tpot_ms is None or one.ttft_ms is None:
        return f"{figure(one.step_ms)} ms a step"
    if goal == "ttft":
        return f"{figure(one.ttft_ms)} ms to the first token"
    return f"{figure(one.tokens_per_s)} tokens/s" if goal == "throughput" else f"{figure(one.tpot_ms)} ms a token"


def _predicted(one: Estimate) -> Predicted:
    return Predicted(
        name=one.layout.name,
        step_ms=one.latency_s * 1e3,
        tokens_per_s=one.tokens_per_s,
        step_share=one.seconds.shares(),
        memory_bytes_per_rank=asdict(one.memory) | {"total": one.memory.total},
        ttft_ms=one.ttft_s * 1e3 if one.ttft_s is not None else None,
        tpot_ms=one.tpot_s * 1e3 if one.tpot_s is not None else None,
    )
