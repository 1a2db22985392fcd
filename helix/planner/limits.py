"""What to say where no layout fits: which limit binds, by how much, and the nearest layout that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from helix.config.schema import ConfigError, Misfit
from helix.config.words import size
from helix.partition.grid import divisors
from helix.planner.candidates import Asked, cuts_tokens
from helix.planner.estimate import Estimator
from helix.planner.search import Found, search

_MEANING = {"m": "feature slices", "n": "head groups", "data": "replicas", "stage": "pipeline stages"}
# The nearest number of devices is looked for up to so many times as many.
FARTHEST = 256


def refuse(estimator: Estimator, asked: Asked, found: Found, goal: str, names: tuple[str, str]) -> Misfit:
    """The error of a search that found nothing.

    Args:
        names: the model's and the hardware's.
    """
    nearest = _nearest(estimator, asked, goal)
    if found.smallest is None:
        return Misfit(f"{_no_layout(estimator, asked, names[0])}; {nearest}")
    layout, _ = found.smallest
    memory = estimator.memory(layout)
    room = estimator.room
    parts = {
        "weights": memory.weights,
        "gradients and moments": memory.state,
        "activations": memory.activations,
        "cache": memory.cache,
    }
    held = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    return Misfit(
        f"memory binds: {names[0]} needs at least {size(memory.total)} a device on "
        f"{_count(estimator.machine.devices)} of {names[1]}{_fixed(asked)} ({layout.name}: {held}), "
        f"{size(memory.total - room)} more than the {size(room)} that may be filled; {nearest}"
    )


def _no_layout(estimator: Estimator, asked: Asked, model: str) -> str:
    """The limit that the first size that was given goes beyond, or else that all of them do together."""
    own = _one_size(estimator, asked, model)
    if own:
        return own
    devices, given = estimator.machine.devices, _given(asked)
    product = 1
    for value in given.values():
        product *= value
    if devices % product:
        ranks = _ranks(product)
        over = f"{product - devices} more than" if product > devices else "which do not divide"
        rest = "" if product > devices else f" ({devices % product} left over)"
        return f"the devices bind: {_sizes(given)} {ranks}, {over} {_count(devices)}{rest}"
    return _divided(estimator, asked, model)


def _one_size(estimator: Estimator, asked: Asked, model: str) -> str | None:
    """A size that the model or the batch does not allow on any number of devices."""
    shape, batch = estimator.shape, estimator.work.batch
    if asked.stage is not None and asked.stage > shape.layers:
        return (
            f"layers bind: stage={asked.stage} is {asked.stage - shape.layers} more pipeline stages than the "
            f"{shape.layers} layers of {model}"
        )
    if asked.data is not None and asked.data > batch:
        return f"the batch binds: data={asked.data} is {asked.data - batch} more replicas than {_sequences(batch)}"
    if asked.data is not None and batch % asked.data:
        return (
            f"the batch binds: data={asked.data} (replicas) does not divide {_sequences(batch)} ({batch % asked.data} "
            "left over)"
        )
    features, what = shape.head_dim // shape.layout.parts, "pairs of features" if shape.rope else "features"
    if asked.m is not None and features % asked.m:
        return f"head_dim binds: m={asked.m} slices {_over(asked.m, features)} {what} of a head of {model}"
    if asked.n is not None and shape.heads % asked.n:
        return (
            f"heads bind: n={asked.n} groups {_over(asked.n, shape.heads)} heads ({shape.kv_heads} key/value) of "
            f"{model}"
        )
    return None


def _over(count: int, of: int) -> str:
    return f"are {count - of} more than the {of}" if count > of else f"do not divide the {of}"


def _divided(estimator: Estimator, asked: Asked, model: str) -> str:
    """No size by itself is at fault: what each of them could be."""
    shape, batch, devices = estimator.shape, estimator.work.batch, estimator.machine.devices
    features = shape.head_dim // shape.layout.parts
    tokens = estimator.work.length // 2 if cuts_tokens(shape, estimator.work) and not asked.runnable else 1
    prime = short = ""
    if len(divisors(devices)) == 2 and not _given(asked):
        prime, longest = " (a prime number)", max(shape.heads, features, batch, shape.layers, tokens)
        short = f"; one of them would have to be {devices}"
        short += f", and the longest is {devices - longest} short" if devices > longest else ""
    cut = f", cuts of the sequence divide {tokens}" if tokens > 1 else ""
    return (
        f"divisibility binds: no layout of {_count(devices)}{prime}{_fixed(asked)} divides {model}: n divides "
        f"kv_heads={shape.kv_heads}, or heads={shape.heads} with key/value heads copied, m divides {features} "
        f"features, data the batch of {batch}{cut}, and stage is at most {shape.layers}{short}"
    )


def _given(asked: Asked) -> dict[str, int]:
    return {name: getattr(asked, name) for name in _MEANING if getattr(asked, name) is not None}


def _sizes(given: dict[str, int]) -> str:
    return " x ".join(f"{name}={value} ({_MEANING[name]})" for name, value in given.items())


def _fixed(asked: Asked) -> str:
    """What was asked for besides the devices."""
    given = _given(asked)
    sizes = f" with {' '.join(f'{name}={value}' for name, value in given.items())}" if given else ""
    return sizes + (" that Helix's commands run" if asked.runnable else "")


def _ranks(count: int) -> str:
    return "is 1 rank" if count == 1 else f"are {count} ranks"


def _sequences(batch: int) -> str:
    return "the one sequence of the batch" if batch == 1 else f"the batch of {batch} sequences"


def _count(devices: int) -> str:
    return "1 device" if devices == 1 else f"{devices} devices"


def _nearest(estimator: Estimator, asked: Asked, goal: str) -> str:
    """The layout that fits with the least change."""
    for devices, wanted in _changes(estimator.machine.devices, asked):
        try:
            machine = estimator.machine.at(devices)
        except ConfigError:  # beyond an island whose outer links nobody has stated
            continue
        found = search(Estimator(estimator.shape, machine, estimator.work), goal, wanted)
        if found.fitting:
            best = found.fitting[0]
            where = f"{best.layout.name} on {_count(devices)}"
            return f"the nearest that fits is {where}, with {size(best.memory.total)} each"
    most = _count(estimator.machine.devices * FARTHEST)
    shorter = ", recompute=full" if estimator.work.mode == "train" and asked.recompute != "full" else ""
    return f"nothing fits on up to {most} either; take a shorter sequence, a smaller batch{shorter}"


def _changes(devices: int, asked: Asked) -> Iterator[tuple[int, Asked]]:
    """What to try, nearest first: one size that was given, then the number of devices, then that without sizes."""
    given = _given(asked)
    others = [(name, value) for name in given for value in divisors(devices) if value != given[name]]
    for name, value in sorted(others, key=lambda other: abs(other[1] - given[other[0]])):
        changed: dict[str, Any] = {name: value}
        yield devices, replace(asked, **changed)
    for count in _counts(devices):
        yield count, asked
    if given:
        for count in _counts(devices):
            yield count, replace(asked, m=None, n=None, data=None, stage=None)


def _counts(devices: int) -> Iterator[int]:
    """Numbers of devices to try, nearest first: the same, a few more or fewer, then half as many more and so on."""
    yield devices
    for step in range(1, 5):
        yield devices + step
        if devices > step:
            yield devices - step
    more = devices
    while more < devices * FARTHEST:
        for count in (more * 3 // 2, more * 2):
            if count > devices + 4:
                yield count
        more *= 2
