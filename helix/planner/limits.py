"""What to say where no layout fits: which limit binds, by how much, and the nearest layout that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from helix.config.schema import Misfit
from helix.config.words import size
from helix.partition.grid import divisors
from helix.planner.candidates import Asked
from helix.planner.estimate import Estimator
from helix.planner.search import Found, search
from helix.planner.work import HEADROOM

_MEANING = {"m": "feature slices", "n": "head groups", "data": "replicas", "stage": "pipeline stages"}
# The nearest number of devices is looked for up to so many times as many.
FARTHEST = 256


def refuse(estimator: Estimator, asked: Asked, found: Found, goal: str, names: tuple[str, str]) -> Misfit:
    """The error of a search that found nothing.

    Args:
        names: the model's and the hardware's.
    """
    if found.smallest is None:
        return Misfit(f"{_no_layout(estimator, asked, names[0])}; {_nearest(estimator, _freed(asked), goal)}")
    layout, _ = found.smallest
    memory = estimator.memory(layout)
    room = HEADROOM * estimator.machine.memory_bytes
    parts = {
        "weights": memory.weights,
        "gradients and moments": memory.state,
        "activations": memory.activations,
        "cache": memory.cache,
    }
    held = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    devices = estimator.machine.devices
    return Misfit(
        f"memory binds: {names[0]} needs at least {size(memory.total)} a device on {_count(devices)} of {names[1]} "
        f"({layout.name}: {held}), {size(memory.total - room)} more than the {size(room)} that may be filled; "
        f"{_nearest(estimator, asked, goal)}"
    )


def _no_layout(estimator: Estimator, asked: Asked, model: str) -> str:
    shape, work, devices = estimator.shape, estimator.work, estimator.machine.devices
    if asked.stage is not None and asked.stage > shape.layers:
        return (
            f"layers bind: stage={asked.stage} is {asked.stage - shape.layers} more pipeline stages than the "
            f"{shape.layers} layers of {model}"
        )
    if asked.data is not None and asked.data > work.batch:
        return f"the batch binds: data={asked.data} replicas are {asked.data - work.batch} more than its sequences"
    given = {name: getattr(asked, name) for name in _MEANING if getattr(asked, name) is not None}
    product = 1
    for value in given.values():
        product *= value
    if devices % product:
        return (
            f"the devices bind: {_sizes(given)} are {product} ranks, which do not divide {_count(devices)} "
            f"({devices % product} are left over)"
        )
    features = shape.head_dim // shape.layout.parts
    prime = " (a prime number)" if len(divisors(devices)) == 2 else ""
    fixed = f" with {_sizes(given)}" if given else ""
    return (
        f"divisibility binds: no layout of {_count(devices)}{prime}{fixed} divides {model}: n divides kv_heads="
        f"{shape.kv_heads}, m divides {features} features, data the batch of {work.batch}, and stage is at most "
        f"{shape.layers}"
    )


def _sizes(given: dict[str, int]) -> str:
    return " and ".join(f"{name}={value} ({_MEANING[name]})" for name, value in given.items())


def _count(devices: int) -> str:
    return "1 device" if devices == 1 else f"{devices} devices"


def _freed(asked: Asked) -> Asked:
    """Without the sizes that were given, of which one is at fault."""
    return replace(asked, m=None, n=None, data=None, stage=None)


def _nearest(estimator: Estimator, asked: Asked, goal: str) -> str:
    """The fewest devices above these, or the most below, that some layout fits."""
    for devices in _counts(estimator.machine.devices):
        machine = replace(estimator.machine, devices=devices)
        found = search(Estimator(estimator.shape, machine, estimator.work), goal, asked)
        if found.fitting:
            best = found.fitting[0]
            where = f"{best.layout.name} on {_count(devices)}"
            return f"the nearest that fits is {where}, with {size(best.memory.total)} each"
    shorter = "a shorter sequence, a smaller batch" + (", recompute=full" if estimator.work.mode == "train" else "")
    return f"nothing fits on up to {_count(estimator.machine.devices * FARTHEST)} either; take {shorter}"


def _counts(devices: int) -> Iterator[int]:
    """Numbers of devices to try, nearest first: the same, a few more or fewer, then twice as many and so on."""
    yield devices
    for step in range(1, 5):
        yield devices + step
        if devices > step:
            yield devices - step
    more = devices
    while more < devices * FARTHEST:
        more *= 2
        if more > devices + 4:
            yield more
