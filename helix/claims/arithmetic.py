"""Checks of the papers' sizes, bytes and FLOPs against the library's own closed forms; and the list of all checks.

Each is a pure function of what the ledger gives it (the papers' figures, a model of `conf/model`), and uses the forms
that plans and runs are held against, so that a claim is judged by what the tests hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from helix.claims import counting, intervals
from helix.claims.outcome import Outcome
from helix.config.hardware import HardwareConfig
from helix.config.schema import ConfigError, to_shape
from helix.config.words import size
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import TransformerCost
from helix.planner import catalogue
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import machine_of
from helix.planner.work import Work

FP16 = 2  # bytes of a number: "All experiments use mixed precision (FP16)"
DEVICES = 16
HARDWARE = "dgx_h100_x2"
ROUNDED = 0.1  # "~45GB" is allowed to be a tenth off


@cache  # files are read once, however many claims are about what they hold
def _shape(model: str) -> TransformerShape:
    return to_shape(catalogue.model(model))


@cache
def _hardware(name: str = HARDWARE) -> HardwareConfig:
    return catalogue.hardware(name)


def parameters_per_device(model: str, stated: float) -> Outcome:
    """Bytes of parameters on one of 16 devices; TP8 x PP2 and m x n = 16 both cut every matrix into 16 parts."""
    count = _shape(model).parameters()
    follows = count * FP16 / DEVICES
    words = f"{count / 1e9:.2f} billion parameters x {FP16} bytes / {DEVICES} = {size(follows)}, not {size(stated)}"
    return Outcome(stated, follows, abs(stated / follows - 1) <= ROUNDED, words)


def total_per_device(model: str, parts: Sequence[float], stated: float) -> Outcome:
    """A device's memory with the parameters that the model has; `parts` are the other stated parts."""
    weights = _shape(model).parameters() * FP16 / DEVICES
    follows = weights + sum(parts)
    sizes = " + ".join(size(part) for part in parts)
    words = f"parameters {size(weights)} + {sizes} = {size(follows)}, not {size(stated)}"
    return Outcome(stated, follows, abs(stated / follows - 1) <= ROUNDED, words)


def cache_within(model: str, batch: int, length: int, stated: float) -> Outcome:
    """Whether keys and values of all tokens fit into the memory stated for one of 16 devices."""
    settings = catalogue.model(model)
    shape = catalogue.shape(settings, "generate")
    work = Work("generate", batch, length, 1, precision="16-true")
    estimator = Estimator(shape, machine_of(_hardware(), "16-true", DEVICES), work)
    follows = estimator.memory(Layout("helix", 4, 4, decode="batch")).cache
    words = (
        f"keys and values of {batch} x {length} tokens in {shape.layers} layers: {size(follows * DEVICES)}, "
        f"{size(follows)} on each of {DEVICES}; stated for all: {size(stated)}"
    )
    return Outcome(stated, follows, follows <= stated, words)


def whole_input_within(model: str, batch: int, length: int, stated: float, parts: int = 1) -> Outcome:
    """Whether X of a batch in parts, of which X W^(i,j) needs all, fits into the activations stated for a device."""
    width = _shape(model).width
    follows = batch / parts * length * width * FP16
    tokens = f"{batch} x {length}" if parts == 1 else f"{batch} / {parts} x {length}"
    words = f"X: {tokens} x {width} x {FP16} bytes = {size(follows)} on each device; stated: {size(stated)}"
    return Outcome(stated, follows, follows <= stated, words)


def share_of_peak(
    model: str,
    tokens_per_s: float,
    batch: int,
    length: int,
    devices: int = DEVICES,
    causal: bool = True,
    efficiency: float = 1.0,
) -> Outcome:
    """The part of all devices' FP16 peak that a speed needs for its matrix products alone.

    Args:
        devices: that reach tokens_per_s on 16 divided by (16 / devices) x efficiency.
        causal: whether a token sees only those before it; the papers' formula has no mask.
    """
    one = _shape(model)
    shape = TransformerShape(
        one.layers, one.width, one.heads, one.kv_heads, one.head_dim, one.mlp_hidden, one.vocab,
        causal=causal, experts=one.experts, top_k=one.top_k,
    )  # fmt: skip
    options = AttentionOptions("batch")
    flops = TransformerCost(shape, Grid(1, 1), options, batch, length, FP16).flops(0) / (batch * length)
    peak = (_hardware().matmul_bf16_TFLOP_per_s or 0.0) * 1e12
    speed = tokens_per_s / (DEVICES / devices * efficiency)
    follows = flops * speed / (devices * peak)
    words = (
        f"{speed:,.0f} tokens/s x {flops / 1e9:.2f} GFLOP a token {'with' if causal else 'without'} a causal mask / "
        f"({devices} x {peak / 1e12:.0f} TFLOP/s) = {follows:.0%} of the peak"
    )
    return Outcome(1.0, follows, follows <= 1, words)


def same_speed(models: Sequence[str], batch: int, length: int, stated: float) -> Outcome:
    """FLOPs of a token in the dearest of several models over those in the cheapest: one speed cannot be all theirs."""
    found = {}
    for model in models:
        cost = TransformerCost(_shape(model), Grid(1, 1), AttentionOptions("batch"), batch, length, FP16)
        found[model] = cost.flops(0) / (batch * length)
    follows = max(found.values()) / min(found.values())
    each = ", ".join(f"{name} {flops / 1e9:.2f}" for name, flops in found.items())
    words = f"GFLOP of a token: {each}; {follows:.1f} times apart at one speed of {stated / 1e6:.2f} M tokens/s"
    return Outcome(1.0, follows, follows <= 1 + ROUNDED, words)


def block_coverage(heads: int, head_dim: int, m: int, n: int) -> Outcome:
    """The part of a D x D matrix in its m * n blocks of (d_s h_g) x (d_s h_g)."""
    side = head_dim // m * (heads // n)
    follows = m * n * side**2 / (heads * head_dim) ** 2
    words = (
        f"{m * n} blocks of {side} x {side} hold {follows:.4f} of W ({heads * head_dim} x {heads * head_dim}), "
        f"1 / (m n); and X with {heads * head_dim} columns cannot be multiplied by {side} rows"
    )
    return Outcome(1.0, follows, follows == 1, words)


def sent_bytes(model: str, batch: int, length: int, m: int, n: int, tensor: int, stage: int) -> Outcome:
    """Bytes that a rank sends with the papers' concatenation, as multiples of tensor parallelism's in stages.

    Both keep the whole stream on every rank, as the papers' figures do; the MLP is cut over all ranks of a stage.
    """
    shape, tokens = _shape(model), batch * length
    concat = AttentionOptions("perslice", aggregate="concat", residual="replicated")
    ours = TransformerCost(shape, Grid(m, n), concat, batch, length, FP16).bytes(0)
    plain = AttentionOptions("batch", residual="replicated")
    theirs = TransformerCost(shape, Grid(1, tensor), plain, batch, length, FP16).bytes(0)
    within = sum(theirs.values()) // stage + (stage - 1) * tokens * shape.width * FP16 // tensor
    follows = sum(ours.values()) / within
    attention, its = (sum(sent for name, sent in each.items() if "attention" in name) for each in (ours, theirs))
    layer, its_layer = (
        sum(sent for name, sent in each.items() if "attention" in name or "mlp" in name) / shape.layers
        for each in (ours, theirs)
    )
    words = (
        f"m={m}, n={n}: {size(sum(ours.values()))} a rank and pass; TP{tensor} x PP{stage}: {size(within)}; "
        f"{follows:.2f} times; attention alone {size(attention)} to {size(its / stage)}, "
        f"{attention * stage / its:.2f} times; one layer {size(layer)} to {size(its_layer)} on the ranks that have it"
    )
    return Outcome(1.0, follows, follows <= 1, words)


def gpus_of_system(hardware: str, stated: int, systems: int = 1) -> Outcome:
    """Whether systems of a kind have as many GPUs as are stated."""
    one = _hardware(hardware).devices_per_host or 0
    words = f"{systems} x {hardware} with {one} GPUs each: {systems * one}; stated: {stated}"
    return Outcome(stated, systems * one, stated == systems * one, words)


def bandwidth_within(stated: Sequence[float], tokens_per_s: Sequence[float]) -> Outcome:
    """Whether stated memory bandwidths are within the data sheet's; and what they say of one token."""
    most = (_hardware().memory_GB_per_s or 0.0) * 1e9
    each = [size(bandwidth * DEVICES / speed) for bandwidth, speed in zip(stated, tokens_per_s, strict=True)]
    words = f"data sheet: {size(most)}/s; {' and '.join(each)} moved a token"
    return Outcome(max(stated), most, max(stated) <= most, words)


_ALL: tuple[Callable[..., Outcome], ...] = (
    parameters_per_device,
    total_per_device,
    cache_within,
    whole_input_within,
    share_of_peak,
    same_speed,
    block_coverage,
    sent_bytes,
    gpus_of_system,
    bandwidth_within,
    *counting.ALL,
    *intervals.ALL,
)
CHECKS: dict[str, Callable[..., Outcome]] = {each.__name__: each for each in _ALL}


def run_check(name: str, given: Mapping[str, Any]) -> Outcome:
    """Run a check by its name.

    Raises:
        ConfigError: if there is none of that name, or it takes other arguments or other figures.
    """
    if name not in CHECKS:
        raise ConfigError(f"there is no check {name}; choose one of: {', '.join(CHECKS)}")
    check = CHECKS[name]
    try:
        inspect.signature(check).bind(**given)
    except TypeError as error:
        legal = ", ".join(inspect.signature(check).parameters)
        raise ConfigError(f"{name}: {error}; it takes {legal}") from error
    try:
        return check(**given)
    except (ConfigError, PartitionError):
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be computed from {dict(given)}: {error}") from error
