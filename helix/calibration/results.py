"""From the times of a calibration's passes to what a file of conf/hardware says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize

from helix.calibration import compute
from helix.calibration.compute import TURN
from helix.calibration.notes import PEAKS, notes_of
from helix.calibration.points import Points
from helix.config.hardware import (
    HardwareConfig,
    MeasuredAttention,
    MeasuredExchange,
    MeasuredProducts,
    MeasuredTurns,
)
from helix.planner.curves import Curve
from helix.planner.layout import Layout
from helix.planner.machine import Machine
from helix.planner.passes import SCORE_PASSES, Passes
from helix.study.statistics import Typical, typical

ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Host:
    """What a rank says of the machine.

    Args:
        processor: name of the GPU, or of the CPU.
        memory_GB: of one GPU; None of cores, which share the host's.
    """

    processor: str
    memory_GB: float | None


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Args:
        hardware: the file's content.
        intervals: of those figures that stand alone, by key.
        notes: what each figure is of, by key; a file's comments.
        points: what was measured.
        turn_s: seconds of one turn at computing by itself (`compute.block`); None on GPUs, which nobody shares.
    """

    hardware: HardwareConfig
    intervals: dict[str, Typical]
    notes: dict[str, str]
    points: Points
    turn_s: float | None


def computing(points: Points, times: Mapping[compute.Label, list[float]]) -> Calibration:
    """What the passes of one device say.

    Args:
        times: seconds of one call in each pass, of the slowest rank.
    """
    layer = points.layer
    rates = {
        width: _over(compute.product_flops(layer, width), times["product", width], 1e12) for width in points.widths
    }
    best = max(points.widths, key=lambda width: typical(rates[width]).value)
    peak = typical(rates[best])
    intervals = {PEAKS[points.precision]: peak}
    main = times["precision", points.precision]
    for name in compute.OTHER_PRECISIONS[points.device]:
        # As much faster or slower as the same product, in the same pass.
        ratios = _ratios(main, times["precision", name])
        intervals[PEAKS[name]] = typical([peak.value * ratio for ratio in ratios])
    products = MeasuredProducts(
        list(points.widths), *_lists([_ratios(rates[width], rates[best]) for width in points.widths])
    )
    attention = [_attention(points, times, head_dim, rates[best]) for head_dim in points.head_dims]
    intervals["attention_share"] = max(
        (
            Typical(*each, points.rounds)
            for row in attention
            for each in zip(row.share, row.low, row.high, strict=True)
        ),
        key=lambda found: found.value,
    )
    intervals["memory_GB_per_s"] = typical(_memory_rates(points, times))
    intervals["scores_GB_per_s"] = typical(_scores_rates(points, times, peak.value, products))
    intervals["kernel_us"] = typical(_overheads(times))
    if ("tensor layers", compute.MANY_LAYERS) in times:
        intervals["dtensor_us"] = typical(_dispatch(times))
    hardware = HardwareConfig(
        devices_per_host=points.devices,
        hosts=1,
        matmul_share=1.0,
        memory_share=1.0,
        ranks_take_turns=points.device == "cpu",
        products=products,
        attention=attention,
    )
    notes = notes_of(points, best, operations_of_a_layer())
    turn_s = typical(times[TURN,]).value if (TURN,) in times else None
    return Calibration(_with(hardware, intervals), intervals, notes, points, turn_s)


def exchanging(
    found: Calibration,
    times: Mapping[int, Mapping[tuple[str, int, int], list[float]]],
    buffers: Mapping[int, Sequence[int]],
) -> Calibration:
    """The same with what collectives say.

    Args:
        times: by number of ranks: seconds of each collective in each pass, of the slowest rank.
        buffers: by number of ranks: bytes that each rank's first step took besides tensors.
    """
    rows = []
    for ranks, labels in times.items():
        for kind, group in sorted({label[:2] for label in labels if label[0] != TURN}):
            sizes = sorted(size for name, other, size in labels if (name, other) == (kind, group))
            us = _lists([[second * 1e6 for second in labels[kind, group, size]] for size in sizes])
            rows.append(MeasuredExchange(kind, ranks, group, sizes, *us))
    hardware = replace(found.hardware, exchanges=rows, turns=_turns(found, times))
    intervals = dict(found.intervals)
    if times:
        hardware.link_share = 1.0
        intervals["link_GB_per_s"], intervals["link_latency_us"] = _link(times[2])
        held = [nbytes / 1e6 for each in buffers.values() for nbytes in each]
        if len(held) >= 6:  # ranks; fewer have no interval
            intervals["rank_MB"] = typical(held)
        else:
            hardware.rank_MB = _rounded(float(np.median(held)))
    return replace(found, hardware=_with(hardware, intervals), intervals=intervals)


def _turns(found: Calibration, times: Mapping[int, Mapping[tuple[str, int, int], list[float]]]) -> MeasuredTurns:
    """Times as long as a rank's share of the cores takes, what the exchange takes by itself left out."""
    slower = {}
    for ranks, labels in times.items():
        if found.turn_s is not None and (TURN, ranks, 1) in labels:
            share = found.turn_s * max(1.0, ranks / found.points.devices)
            both = zip(labels[TURN, ranks, 1], labels[TURN, ranks, 0], strict=True)
            slower[ranks] = [max(whole - alone, whole / 2) / share for whole, alone in both]
    return MeasuredTurns(list(slower), *_lists(list(slower.values()))) if slower else MeasuredTurns()


def operations_of_a_layer() -> float:
    """As many as the time model counts in one layer of a small model: its time where each takes a second."""
    inf = math.inf
    machine = Machine("counting", 1, 1, inf, inf, inf, inf, inf, inf, 0.0, 0.0, kernel_s=1.0)
    shape = compute.overhead_shape(1)
    return Passes(shape, machine, ITEMSIZE["float32"]).layer(Layout("helix"), 1, 1, 1).forward.total


def _attention(
    points: Points, times: Mapping[compute.Label, list[float]], head_dim: int, peaks: Sequence[float]
) -> MeasuredAttention:
    shares = []
    for length in points.lengths:
        flops = compute.attention_flops(*compute.attention_count(points, head_dim, length), length, head_dim)
        shares.append(_ratios(_over(flops, times["attention", head_dim, length], 1e12), peaks))
    return MeasuredAttention(head_dim, list(points.lengths), *_lists(shares))


def _memory_rates(points: Points, times: Mapping[compute.Label, list[float]]) -> list[float]:
    """GB/s of a layer's streams, all bytes over all times."""
    nbytes = compute.stream_bytes(points.layer, ITEMSIZE[points.precision])
    counts = compute.STREAMS_OF_A_LAYER
    whole = sum(nbytes[name] * count for name, count in counts.items())
    seconds = [
        sum(times["stream", name][turn] * count for name, count in counts.items()) for turn in range(points.rounds)
    ]
    return _over(whole, seconds, 1e9)


def _scores_rates(
    points: Points, times: Mapping[compute.Label, list[float]], peak: float, products: MeasuredProducts
) -> list[float]:
    """GB/s of attention's scores as the time model counts them, the products' own time left out."""
    samples, heads, length = compute.scores_dims(points)
    pairs, whole, narrow = samples * heads * length**2, points.layer.head_dim, compute.narrow_dim(points)
    share = Curve(tuple(products.width), tuple(products.share))
    flops = {"score": (4 * pairs * whole, whole), "gather": (2 * pairs * (whole + narrow), narrow)}
    schedules = [str(label[1]) for label in times if label[0] == "scores"]
    computing = sum(count / (peak * 1e12 * share(width)) for count, width in map(flops.__getitem__, schedules))
    nbytes = len(schedules) * SCORE_PASSES * pairs * ITEMSIZE[points.precision]
    seconds = (sum(times["scores", name][turn] for name in schedules) for turn in range(points.rounds))
    # Scores of heads as small as these take far longer to write than to compute; a busy machine must not say else.
    return _over(nbytes, [max(each - computing, each / 2) for each in seconds], 1e9)


def _overheads(times: Mapping[compute.Label, list[float]]) -> list[float]:
    """Microseconds of an operation."""
    count = operations_of_a_layer()
    return [max(0.0, layer) / count for layer in _layers(times, "layers")]


def _dispatch(times: Mapping[compute.Label, list[float]]) -> list[float]:
    """Microseconds that a layer of tensor parallelism takes longer than the same layer on plain tensors."""
    both = zip(_layers(times, "tensor layers"), _layers(times, "plain layers"), strict=True)
    return [max(0.0, cut - plain) for cut, plain in both]


def _layers(times: Mapping[compute.Label, list[float]], name: str) -> list[float]:
    """Microseconds of a layer: what more layers take, so that the model's ends are not in it."""
    few, many = compute.FEW_LAYERS, compute.MANY_LAYERS
    models = zip(times[name, few], times[name, many], strict=True)
    return [(long - short) / (many - few) * 1e6 for short, long in models]


def _link(times: Mapping[tuple[str, int, int], list[float]]) -> tuple[Typical, Typical]:
    """GB/s and microseconds of two ranks' all-to-all, fitted in each pass with relative errors."""
    sizes = sorted(size for kind, group, size in times if (kind, group) == ("all_to_all", 2))
    passes = zip(*(times["all_to_all", 2, size] for size in sizes), strict=True)
    rates, latencies = [], []
    for each in passes:
        seconds = np.array(each)
        terms = np.stack([np.ones(len(sizes)), sizes], axis=1)
        (latency, slope), _ = optimize.nnls(terms / seconds[:, None], np.ones(len(sizes)))
        latencies.append(latency * 1e6)
        # Of few points on a busy machine the smaller exchange may have been the slower one.
        rates.append(1e-9 / slope if slope > 0 else sizes[-1] / each[-1] * 1e-9)
    return typical(rates), typical(latencies)


def _ratios(some: Sequence[float], others: Sequence[float]) -> list[float]:
    """Each pass's own: what slows a whole pass falls out."""
    return [one / other for one, other in zip(some, others, strict=True)]


def _over(amount: float, seconds: Sequence[float], unit: float) -> list[float]:
    return [amount / each / unit for each in seconds]


def _lists(passes: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """The medians of some figures, and their intervals' lower and upper ends."""
    found = [typical(each) for each in passes]
    values, lows, highs = ([_rounded(end) for end in ends] for ends in zip(*map(_ends, found), strict=True))
    return values, lows, highs


def _ends(one: Typical) -> tuple[float, float, float]:
    return one.value, one.low, one.high


def _with(hardware: HardwareConfig, intervals: Mapping[str, Typical]) -> HardwareConfig:
    values: dict[str, Any] = {key: _rounded(found.value) for key, found in intervals.items()}
    return replace(hardware, **values)


def _rounded(value: float) -> float:
    """To four digits, which is more than is known."""
    return float(f"{value:.4g}")
