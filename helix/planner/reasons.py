"""Why a plan recommends what it does, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from helix.config.words import size
from helix.planner.candidates import kv_copies
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.search import GOALS, Found, best_of_methods, kind
from helix.planner.work import HEADROOM, Estimate


def reasons(estimator: Estimator, found: Found, goal: str) -> Iterator[str]:
    """What made the best layout the best, the most important first."""
    best = found.fitting[0]
    if best.layout.method == "data":
        yield _whole(estimator, best)
    elif best.layout.tokens > 1:
        yield _tokens(best)
    else:
        yield _slices(estimator, found, goal)
        yield from _replicas(estimator, found)
    if best.layout.stage > 1:
        yield _stages(found, goal)
    others = [one for name, one in best_of_methods(found.fitting).items() if name != kind(best.layout)]
    if others:
        rest = "; ".join(f"{kind(one.layout)}: {one.layout.name} at {_ratio(best, one, goal)}" for one in others)
        yield f"The best of the other methods, as parts of its {_WORDS[goal]}: {rest}."
    if not best.layout.runs_in(estimator.work.mode):
        yield _runnable(estimator, found, goal)
    yield from _alone(estimator, best, goal)
    shares = ", ".join(f"{_PARTS[name]} {part:.0%}" for name, part in best.seconds.shares().items() if part >= 0.005)
    yield f"Its time goes to {shares}."


_WORDS = {
    "throughput": "tokens per second",
    "latency": "speed",
    "ttft": "speed to the first token",
    "tpot": "speed per output token",
    "memory": "memory (more is worse)",
}
_PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory": "memory-bound operations",
    "exchange": "communication",
    "waiting": "the pipeline's bubble",
}


def _ratio(best: Estimate, other: Estimate, goal: str) -> str:
    """How the other one compares; below 1 is slower, or for memory above 1 is larger."""
    own, theirs = GOALS[goal](best), GOALS[goal](other)
    return f"{theirs / own:.2f}" if goal in ("throughput", "memory") else f"{own / theirs:.2f}"


def _whole(estimator: Estimator, best: Estimate) -> str:
    room = HEADROOM * estimator.machine.memory_bytes
    there = f" of {size(room)}" if room < math.inf else ""
    fits = f"the whole model fits on one device ({size(best.memory.total)}{there})"
    if best.layout.ranks == 1:
        return f"One device: {fits}, and there is nothing to divide."
    moves = (
        "only gradients move between devices" if estimator.work.mode == "train" else "nothing moves between devices"
    )
    if estimator.shape.experts:
        moves = "only tokens for experts move between devices"
    return f"Use data parallelism: {fits}, and {moves}; neither heads nor features need to be divided."


def _runnable(estimator: Estimator, found: Found, goal: str) -> str:
    """What to run where the best is no method of Helix's commands."""
    mode, best = estimator.work.mode, found.fitting[0]
    command = "train.py" if mode == "train" else "infer.py"
    runs = [one for one in found.fitting if one.layout.runs_in(mode)]
    if not runs:
        return f"{command} has no method for it, nor for any other layout that fits here."
    own = f"{runs[0].layout.name} at {_ratio(best, runs[0], goal)}"
    return f"{command} has no method for it; the best that it has is {own}."


def _tokens(best: Estimate) -> str:
    """Why sequences are cut."""
    layout = best.layout
    moves = "keys and values alone move" if layout.method == "context" else "tokens are exchanged for heads"
    heads = f", and heads over {layout.n} in each" if layout.n > 1 else ""
    return (
        f"Each sequence is cut over {layout.tokens} ranks{heads}: between the former {moves}, and projections and "
        "MLPs need no collective of theirs; features need not be sliced."
    )


def _alone(estimator: Estimator, best: Estimate, goal: str) -> Iterator[str]:
    """Whether one of the devices would do as well without the others."""
    if estimator.machine.devices == 1 or goal == "memory":
        return
    one = Layout("data")
    alone = Estimator(estimator.shape, replace(estimator.machine, devices=1), estimator.work)
    if alone.fits(alone.memory(one)):
        single = alone.estimate(one)
        if GOALS[goal](single) <= GOALS[goal](best):
            yield f"One device alone would be at {_ratio(best, single, goal)}: use that, the others only wait."


def _slices(estimator: Estimator, found: Found, goal: str) -> str:
    """Why m is what it is."""
    best, shape = found.fitting[0], estimator.shape
    layout = best.layout
    alike = [
        one
        for one in found.fitting
        if one.layout.method in ("helix", "tensor")
        and (one.layout.m > 1) != (layout.m > 1)
        and (one.layout.data, one.layout.stage) == (layout.data, layout.stage)
    ]
    if layout.m == 1 and layout.n == 1:
        return "m=1, n=1: layers are divided, and attention is not."
    if layout.kv_copies > 1:
        held = "their weights; the cache is shared out by tokens" if layout.sharers > 1 else "their weights and cache"
        return (
            f"Tensor parallelism with {layout.kv_copies} copies of each of {shape.kv_heads} key/value heads on "
            f"{layout.n} ranks: whole heads for every rank, at {layout.kv_copies} times the memory of {held}."
            + _rival(best, alike, goal)
        )
    if layout.m == 1:
        return f"m=1: {shape.kv_heads} key/value heads divide over {layout.n} ranks" + _for_nothing(
            estimator, best, alike, goal
        )
    ranks = layout.grid.ranks
    copies = kv_copies(shape, ranks)
    if shape.kv_heads % ranks == 0:
        why = f"{shape.kv_heads} key/value heads would divide over {ranks} ranks, and slices still cost less"
    elif copies is None:
        why = f"{ranks} ranks and {shape.heads} heads: whole heads do not divide over them at all, slices do"
    else:
        why = (
            f"{ranks} ranks and {shape.kv_heads} key/value heads: slices take what heads cannot, and none is held "
            f"{copies} times"
        )
    schedule = f" The schedule is `{layout.prefill}`."
    if estimator.work.mode == "generate":
        schedule = f" Prefill goes by `{layout.prefill}`, the cache is cut by `{layout.decode}`."
    return f"m={layout.m}: {why}.{_rival(best, alike, goal)}{schedule}"


def _rival(best: Estimate, alike: list[Estimate], goal: str) -> str:
    if not alike:
        return ""
    one = alike[0]
    return f" {one.layout.name}{_copies(one)} is at {_ratio(best, one, goal)}."


def _copies(one: Estimate) -> str:
    copies = one.layout.kv_copies
    return f" (with {copies} copies of each key/value head)" if copies > 1 else ""


def _for_nothing(estimator: Estimator, best: Estimate, alike: list[Estimate], goal: str) -> str:
    """What slicing would add."""
    if not alike:
        return "; no grid with m > 1 fits beside it."
    one = alike[0]
    more = estimator.sent_bytes(one.layout) - estimator.sent_bytes(best.layout)
    if more <= 0:
        return f"; slicing ({one.layout.name}) would bring nothing, and is at {_ratio(best, one, goal)}."
    return (
        f"; slicing ({one.layout.name}) would add {size(more)} to what each rank sends in a layer for nothing, and is "
        f"at {_ratio(best, one, goal)}."
    )


def _replicas(estimator: Estimator, found: Found) -> Iterator[str]:
    """Why there are no more replicas, or no fewer."""
    best = found.fitting[0]
    layout = best.layout
    more = [one for one in found.fitting if one.layout.data > layout.data]
    if not more and layout.data < estimator.work.batch and layout.ranks > layout.data:
        room = HEADROOM * estimator.machine.memory_bytes
        yield (
            f"data={layout.data}: with more replicas of fewer ranks the model does not fit into {size(room)} a "
            "device, or the batch does not divide."
        )
    elif layout.data == estimator.work.batch:
        yield f"data={layout.data}: there is one sequence for each replica, and no more to deal out."


def _stages(found: Found, goal: str) -> str:
    best = found.fitting[0]
    flat = [one for one in found.fitting if one.layout.stage == 1]
    if not flat:
        return f"stage={best.layout.stage}: nothing fits without pipeline stages."
    waiting, parts = best.seconds.waiting / best.seconds.total, best.layout.microbatches
    idle = f"with {parts} microbatches" if parts > 1 else "with one part of the batch at a time"
    return (
        f"stage={best.layout.stage}: without stages the best is {flat[0].layout.name} at "
        f"{_ratio(best, flat[0], goal)}; {idle} a stage waits {waiting:.0%} of the time, which costs less than the "
        "collectives of a wider layer."
    )
