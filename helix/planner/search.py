"""The layouts that fit, the best of them, and those that nothing beats in everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from helix.config.schema import ConfigError
from helix.planner.candidates import Asked, candidates
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.work import Estimate

# What a plan may be for, and what of an estimate it makes small.
GOALS: dict[str, Callable[[Estimate], float]] = {
    "throughput": lambda one: -one.tokens_per_s,
    "latency": lambda one: one.seconds.total,
    "ttft": lambda one: math.inf if one.ttft_s is None else one.ttft_s,
    "tpot": lambda one: math.inf if one.tpot_s is None else one.tpot_s,
    "memory": lambda one: one.memory.total,
}
# Figures that agree to so many digits are equal: the simpler layout wins.
DIGITS = 9


def times_as_good(goal: str, one: Estimate, other: Estimate) -> float:
    """How many times as good as the other one an estimate is: as fast, as soon, or in as little memory."""
    own, theirs = GOALS[goal](one), GOALS[goal](other)
    return own / theirs if goal == "throughput" else theirs / own


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        considered: layouts whose dims are legal.
        fitting: those that fit in memory, the best first.
        smallest: the one that needs least memory, whether it fits or not; None if there is no legal layout.
    """

    considered: int
    fitting: tuple[Estimate, ...]
    smallest: tuple[Layout, int] | None


def search(estimator: Estimator, goal: str, asked: Asked) -> Found:
    """Every legal layout of the machine's devices, by what it costs.

    Raises:
        ConfigError: if the goal is none, or not of this mode.
    """
    check_goal(goal, estimator.work.mode)
    considered, fitting = 0, []
    smallest: tuple[Layout, int] | None = None
    for alike in candidates(estimator.shape, estimator.work, estimator.machine.devices, asked):
        considered += len(alike)
        for layout in undominated(estimator, alike):
            memory = estimator.memory(layout)
            if smallest is None or memory.total < smallest[1]:
                smallest = layout, memory.total
            if estimator.fits(memory):
                fitting.append(estimator.estimate(layout))
    cost = GOALS[goal]
    mode = estimator.work.mode

    def order(one: Estimate) -> tuple[object, ...]:
        """Of those that are as good the soonest done, then the smallest, then one that Helix runs, the simplest."""
        as_good = _rounded(cost(one)), _rounded(one.seconds.total), one.memory.total
        return (*as_good, not one.layout.runs_in(mode), simplicity(one.layout))

    fitting.sort(key=order)
    return Found(considered, tuple(fitting), smallest)


def undominated(estimator: Estimator, alike: Sequence[Layout]) -> Sequence[Layout]:
    """Of layouts that differ in their schedules alone, those whose schedules no other one betters in time and memory.

    What a schedule decides of the time and memory of its phase it decides for every goal, so nothing is lost.
    """
    if len(alike) == 1:
        return alike
    prefills = _front({one.prefill: one for one in reversed(alike)}.values(), estimator.prefill_cost)
    kept = [one for one in alike if one.prefill in {each.prefill for each in prefills}]
    if estimator.work.mode != "generate":
        return kept
    decodes = _front({one.decode: one for one in reversed(alike)}.values(), estimator.decode_cost)
    return [one for one in kept if one.decode in {each.decode for each in decodes}]


def _front(layouts: Iterable[Layout], cost: Callable[[Layout], tuple[float, float]]) -> list[Layout]:
    """Those that none betters, one of those that cost the same."""
    kept: list[tuple[float, Layout]] = []
    for (_, memory), one in sorted(((cost(each), each) for each in layouts), key=lambda pair: pair[0]):
        if all(memory < other for other, _ in kept):
            kept.append((memory, one))
    return [one for _, one in kept]


def check_goal(goal: str, mode: str) -> None:
    """Check that a goal is one, and that its figure exists in this mode.

    Raises:
        ConfigError: with the legal ones.
    """
    legal = [name for name in GOALS if mode == "generate" or name not in ("ttft", "tpot")]
    if goal not in legal:
        other = "mode=generate, which has it, or " if goal in GOALS else ""
        raise ConfigError(f"goal={goal} is none of mode={mode}; choose {other}one of: {', '.join(legal)}")


def simplicity(layout: Layout) -> tuple[int, ...]:
    """Small for layouts with few things to go wrong."""
    return (layout.stage, layout.m, layout.microbatches, layout.n, layout.kv_copies)


def pareto(found: Iterable[Estimate]) -> list[Estimate]:
    """Those that no other one equals or betters in throughput, in latency and in memory at once, the fastest first."""
    kept: list[Estimate] = []
    for one in sorted(found, key=lambda each: (*_figures(each), simplicity(each.layout))):
        if not any(_betters(other, one) for other in kept):
            kept.append(one)
    return kept


def best_of_methods(found: Sequence[Estimate]) -> dict[str, Estimate]:
    """The best of each method, in the order in which `found` has them; Helix with one slice and with more apart."""
    out: dict[str, Estimate] = {}
    for one in found:
        out.setdefault(kind(one.layout), one)
    return out


def kind(layout: Layout) -> str:
    """A method's name, with Helix's m = 1, which is tensor parallelism on a sharded stream, apart from m > 1."""
    if layout.method == "helix":
        return "helix, m > 1" if layout.m > 1 else "helix, m = 1"
    if layout.method == "tensor" and layout.kv_copies > 1:
        return "tensor, KV heads copied"
    if layout.method == "tensor" and layout.n == 1:
        return "pipeline"
    return "tensor, sharded stream" if layout.sharded else layout.method


def _figures(one: Estimate) -> tuple[float, ...]:
    figures = (-one.tokens_per_s, one.latency_s, float(one.memory.total))
    return tuple(_rounded(figure) for figure in figures)


def _betters(other: Estimate, one: Estimate) -> bool:
    return all(theirs <= own for theirs, own in zip(_figures(other), _figures(one), strict=True))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
