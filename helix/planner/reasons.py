"""Why a plan recommends what it does, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from helix.config.words import size
from helix.partition.grid import divisors
from helix.planner.candidates import Asked, kv_copies
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.search import GOALS, Found, best_of_methods, kind, search, times_as_good
from helix.planner.work import Estimate

_WORDS = {
    "throughput": "tokens per second",
    "latency": "speed",
    "ttft": "speed to the first token",
    "tpot": "speed per output token",
}
_PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory": "memory-bound operations",
    "exchange": "communication",
    "waiting": "the pipeline's bubble",
    "dispatch": "DTensor's dispatch",
}


def reasons(
    estimator: Estimator, found: Found, goal: str, asked: Asked, less: tuple[int, Estimate] | None
) -> Iterator[str]:
    """What made the best layout the best, the most important first.

    Args:
        less: fewer devices that do better, if there are (`fewer`).
    """
    best = found.fitting[0]
    yield from _fewer(estimator, best, less, goal)
    if best.layout.method == "data":
        yield _whole(estimator, best)
    elif best.layout.tokens > 1:
        yield _tokens(best)
    else:
        yield _slices(estimator, found, goal)
    if best.layout.method != "data" and asked.sizes == 0:
        yield from _replicas(estimator, found)
    if best.layout.stage > 1:
        yield _stages(estimator, found, goal)
    others = [one for name, one in best_of_methods(found.fitting).items() if name != kind(best.layout)]
    if others:
        ratio = _ratio(best, others[0], goal)
        at = f"{ratio} times as good in memory" if goal == "memory" else f"at {ratio} of the {_WORDS[goal]}"
        yield f"The next best method: {others[0].layout.name} ({kind(others[0].layout)}), {at}."
    if not best.layout.runs_in(estimator.work.mode):
        yield _runnable(estimator, found, goal)
    shares = ", ".join(f"{_PARTS[name]} {part:.0%}" for name, part in best.seconds.shares().items() if part >= 0.005)
    yield f"Its time goes to {shares}."


def few_words(estimator: Estimator, best: Estimate, less: tuple[int, Estimate] | None) -> str:
    """The first reason, for a column of a table."""
    layout, shape = best.layout, estimator.shape
    if less is not None:
        return f"better on {less[0]}: {less[1].layout.name}"
    if layout.method == "data":
        if estimator.ep_size(layout) > 1:
            return f"experts dealt out, {layout.data} replicas"
        return "one device does it" if layout.ranks == 1 else f"fits whole, {layout.data} replicas"
    if layout.tokens > 1:
        return f"sequences cut over {layout.tokens}"
    if layout.m == layout.n == 1:
        return "layers cut, attention whole"
    if layout.kv_copies > 1:
        return f"{shape.kv_heads} KV heads, {layout.kv_copies} copies each"
    if layout.m == 1:
        return f"{shape.kv_heads} KV heads over {layout.n}"
    return f"{shape.heads} / {shape.kv_heads} heads on {layout.grid.ranks}"


def _ratio(best: Estimate, other: Estimate, goal: str) -> str:
    """How the other one compares; below 1 is slower, or for memory larger."""
    return f"{times_as_good(goal, other, best):.2f}"


def _whole(estimator: Estimator, best: Estimate) -> str:
    room, shape = estimator.room, estimator.shape
    there = f" of {size(room)}" if room < math.inf else ""
    held = f"{size(best.memory.total)}{there}"
    if best.layout.ranks == 1:
        return f"One device: the whole model fits ({held}), and there is nothing to divide."
    sharers = estimator.ep_size(best.layout)
    if sharers > 1:
        return (
            f"Use data parallelism with experts dealt out: a device holds everything but experts whole, and "
            f"{shape.experts // sharers} of {shape.experts} experts of a layer ({held}); only tokens for experts"
            f"{' and gradients' if estimator.work.mode == 'train' else ''} move, and neither heads nor features need "
            "to be divided."
        )
    moves = (
        "only gradients move between devices" if estimator.work.mode == "train" else "nothing moves between devices"
    )
    return (
        f"Use data parallelism: the whole model fits on one device ({held}), and {moves}; neither heads nor features "
        "need to be divided."
    )


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
    moves = "only keys and values move" if layout.method == "context" else "tokens are exchanged for heads"
    heads = f", and heads over {layout.n} in each part" if layout.n > 1 else ""
    among = "between the parts" if layout.n > 1 else "between them"
    alone = "" if layout.n > 1 else ", projections and MLPs need no collective"
    return (
        f"Each sequence is cut over {layout.tokens} ranks{heads}: {among} {moves}{alone}, and features need not be "
        "sliced."
    )


def fewer(estimator: Estimator, best: Estimate, goal: str, asked: Asked) -> tuple[int, Estimate] | None:
    """Fewer devices that do better than all of them, and how: half as long as that helps, or one."""
    found, devices = None, estimator.machine.devices
    if goal == "memory" or asked.sizes:
        return None
    while devices % 2 == 0:
        devices //= 2
        half = Estimator(estimator.shape, estimator.machine.at(devices), estimator.work)
        fitting = search(half, goal, asked).fitting
        if not fitting or GOALS[goal](fitting[0]) >= GOALS[goal](found[1] if found else best):
            break
        found = devices, fitting[0]
    one = Layout("data")
    alone = Estimator(estimator.shape, estimator.machine.at(1), estimator.work)
    if estimator.machine.devices > 1 and alone.fits(alone.memory(one)):
        single = alone.estimate(one)
        if GOALS[goal](single) <= GOALS[goal](found[1] if found else best):
            found = 1, single
    return found


def _fewer(estimator: Estimator, best: Estimate, less: tuple[int, Estimate] | None, goal: str) -> Iterator[str]:
    if less is not None:
        count, one = less
        what = "One device alone has" if count == 1 else f"{one.layout.name} on {count} devices has"
        yield (
            f"{what} {_ratio(best, one, goal)} times the {_WORDS[goal]} of all {estimator.machine.devices}: the "
            "others only wait. What follows is for all of them."
        )


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
        held = "their weights"
        if estimator.work.mode == "generate":
            held += "; the cache is shared out by tokens" if layout.sharers > 1 else " and cache"
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
    """Why there are no more replicas."""
    layout, work = found.fitting[0].layout, estimator.work
    more = [count for count in divisors(estimator.machine.devices) if count > layout.data]
    if not more or any(one.layout.data > layout.data for one in found.fitting):
        return
    if layout.data == work.batch:
        each = "one sequence cannot be dealt out" if work.batch == 1 else "there is one sequence for each replica"
        yield f"data={layout.data}: {each}."
    elif work.batch % more[0]:
        yield f"data={layout.data}: {more[0]} replicas do not divide {work.batch} sequences."
    else:
        asked = Asked(data=more[0], recompute=layout.recompute, shard_data=layout.shard_data)
        smallest = search(estimator, "memory", asked).smallest
        room = estimator.room
        if smallest is not None and smallest[1] > room:
            yield (
                f"data={layout.data}: {more[0]} replicas need {size(smallest[1])} a device at least, of "
                f"{size(room)} that may be filled."
            )


def _stages(estimator: Estimator, found: Found, goal: str) -> str:
    best = found.fitting[0]
    flat = [one for one in found.fitting if one.layout.stage == 1]
    if not flat:
        return f"stage={best.layout.stage}: nothing fits without pipeline stages{_in_passes(estimator, best)}."
    if goal == "memory":
        return f"stage={best.layout.stage}: without stages {flat[0].layout.name} is at {_ratio(best, flat[0], goal)}."
    waiting, parts = best.seconds.waiting / best.seconds.total, best.layout.microbatches
    idle = f"with {parts} microbatches" if parts > 1 else "with one part of the batch at a time"
    return (
        f"stage={best.layout.stage}: without stages the best is {flat[0].layout.name} at "
        f"{_ratio(best, flat[0], goal)}; {idle} a stage waits {waiting:.0%} of the time, which costs less than the "
        "collectives of a wider layer."
    )


def _in_passes(estimator: Estimator, best: Estimate) -> str:
    """What fits without stages if fewer sequences go through at once; of forward passes alone, which keep nothing."""
    work = estimator.work
    for passes in divisors(work.batch)[1:] if work.mode == "forward" else []:
        part = Estimator(estimator.shape, estimator.machine, replace(work, batch=work.batch // passes))
        flat = search(part, "throughput", Asked(stage=1)).fitting
        if flat:
            ratio = flat[0].tokens_per_s / best.tokens_per_s
            return (
                f" in one pass; in {passes} passes of {part.work.batch} sequences {flat[0].layout.name} would be at "
                f"{ratio:.2f}"
            )
    return ""
