"""The planner's time and memory: exact where a closed form says so, and never better on a worse machine."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix import Grid
from helix.config.memory import stored_parameters
from helix.config.schema import ConfigError, ModelConfig, ParallelConfig, to_shape
from helix.partition import rivals, wire
from helix.partition.decoding import GenerationCost
from helix.partition.options import AttentionOptions
from helix.partition.phases import Phases
from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import TransformerCost
from helix.planner import catalogue
from helix.planner.answering import Answering, pretrained
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import Machine, machine_of
from helix.planner.passes import LayerTime, Passes
from helix.planner.routing import expected_fullest, expected_touched
from helix.planner.seconds import Seconds
from helix.planner.work import Estimate, Work

MACHINE = Machine("m", 64, 8, 4e14, 3e14, 8e10, 2e12, 3e11, 4e10, 3e-6, 1e-5, 4e-6)
SHAPE = TransformerShape(4, 256, heads=16, kv_heads=8, head_dim=32, mlp_hidden=1024, vocab=512, gated=True)
MOE = replace(SHAPE, experts=8, top_k=2, mlp_hidden=256)
# One second a FLOP, and everything else for nothing.
ARITHMETIC = Machine("a", 64, 64, 1.0, 1.0, math.inf, math.inf, math.inf, math.inf, 0.0, 0.0, 0.0)
RATES = [
    "flops_per_s", "attention_flops_per_s", "memory_bytes_per_s", "link_bytes_per_s", "host_link_bytes_per_s"
]  # fmt: skip
LATENCIES = ["link_s", "host_link_s", "kernel_s"]
LAYOUTS = [
    Layout("data", data=64),
    Layout("tensor", n=8, data=4, stage=2, microbatches=2),
    Layout("tensor", n=16, data=4, kv_copies=2),
    Layout("tensor", n=16, data=4, kv_copies=2, sharded=True, decode="kvseq"),
    Layout("helix", 1, 8, data=8),
    Layout("helix", 4, 4, data=4, prefill="rows", decode="kvseq"),
    Layout("helix", 2, 8, data=4, prefill="batch", decode="batch"),
    Layout("helix", 4, 2, data=4, stage=2, prefill="heads", decode="heads", microbatches=2),
    Layout("ulysses", tokens=8, data=8),
    Layout("context", tokens=16, data=4),
    Layout("context", n=4, tokens=4, data=2, stage=2, microbatches=2),
]
WORKS = [Work("forward", 64, 512), Work("train", 64, 512), Work("generate", 64, 512, 32)]


def able(work: Work) -> list[Layout]:
    return [one for one in LAYOUTS if work.mode != "generate" or one.method not in ("ulysses", "context")]


def estimate(machine: Machine, work: Work, layout: Layout, shape: TransformerShape = SHAPE) -> Estimate:
    return Estimator(shape, machine, work).estimate(layout)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 4), Grid(4, 2), Grid(2, 8)])
@pytest.mark.parametrize("schedule", ["batch", "rows", "heads"])
def test_seconds_are_flops_where_nothing_else_costs(grid: Grid, schedule: str) -> None:
    """Every product of the closed form is in the time model, once."""
    if schedule == "heads" and (8 // grid.n) % grid.m:
        schedule = "rows"
    layout = Layout("helix", grid.m, grid.n, prefill=schedule)
    passes = Passes(SHAPE, ARITHMETIC, 2)
    layer, ends = passes.layer(layout, 8, 64, 1), passes.ends(layout, 8, 64, 1)
    cost = TransformerCost(SHAPE, grid, layout.options, 8, 64, 2)
    assert layer.forward.total * SHAPE.layers + ends.total == cost.flops(0) == passes.flops(layout, 8, 64)


@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one.method in ("helix", "tensor")])
@pytest.mark.parametrize("shape", [SHAPE, MOE])
def test_seconds_of_exchange_are_the_closed_forms_bytes(layout: Layout, shape: TransformerShape) -> None:
    """On one island, one byte a second and no latency: every collective of the closed form, once a layer."""
    machine = replace(ARITHMETIC, link_bytes_per_s=1.0)
    passes = Passes(shape, machine, 2)
    ep_size = Estimator(shape, machine, Work("forward", 64, 64)).ep_size(layout)
    layer, ends = passes.layer(layout, 16, 64, ep_size), passes.ends(layout, 16, 64, ep_size)
    kept = replace(shape, kv_heads=shape.kv_heads * layout.kv_copies)
    cost = TransformerCost(kept, layout.grid, layout.options, 16, 64, 2, ep_size)
    fullest = round(expected_fullest(cost.tokens_per_shard * 2, 8))
    moved = cost.bytes(0, [fullest] * shape.layers if shape.experts else None)
    assert layer.forward.exchange * shape.layers + ends.exchange == pytest.approx(sum(moved.values()))
    each = passes.sent_bytes(layout, 16, 64, ep_size)
    assert each == pytest.approx(layer.forward.exchange)


@given(st.sampled_from(RATES), st.floats(1.0, 8.0), st.sampled_from(WORKS), st.data())
@settings(max_examples=60, deadline=None)
def test_a_faster_part_never_makes_it_slower(part: str, factor: float, work: Work, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(able(work)))
    better = replace(MACHINE, **{part: getattr(MACHINE, part) * factor})  # type: ignore[arg-type]
    assert estimate(better, work, layout).seconds.total <= estimate(MACHINE, work, layout).seconds.total * (1 + 1e-12)


@given(st.sampled_from(LATENCIES), st.floats(1.0, 8.0), st.sampled_from(WORKS), st.data())
@settings(max_examples=40, deadline=None)
def test_more_latency_never_makes_it_faster(part: str, factor: float, work: Work, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(able(work)))
    worse = replace(MACHINE, **{part: getattr(MACHINE, part) * factor})  # type: ignore[arg-type]
    assert estimate(worse, work, layout).seconds.total >= estimate(MACHINE, work, layout).seconds.total * (1 - 1e-12)


@given(
    st.sampled_from(["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]),
    st.sampled_from([1, 2, 4, 8, 16, 64]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 10**9),
)
def test_a_larger_island_never_makes_a_collective_slower(kind: str, size: int, stride: int, nbytes: int) -> None:
    """Where the links inside are the faster ones, and their latency the smaller."""
    times = [
        replace(MACHINE, island=island).collective(kind, nbytes, size, stride) for island in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(times))
    assert times[0] == 0 if size == 1 else times[0] > 0


def test_a_collective_across_islands_uses_the_links_of_all_members() -> None:
    """All-gather over 2 islands of 8: each takes in the other's half, over 8 links at once."""
    free = replace(MACHINE, link_s=0.0, host_link_s=0.0, link_bytes_per_s=math.inf)
    gathered = 16 * 10**6
    sent = wire.all_gather(10**6, 16, 1)
    assert free.collective("all_gather", sent, 16) == pytest.approx(gathered / 2 / 8 / free.host_link_bytes_per_s)
    assert free.collective("all_to_all", 15, 16) == pytest.approx(8 / free.host_link_bytes_per_s)
    assert free.collective("all_gather", sent, 16, stride=8) == pytest.approx(sent / free.host_link_bytes_per_s)


@pytest.mark.parametrize(
    ("size", "stride", "local"),
    [(8, 1, 8), (4, 2, 4), (8, 2, 4), (8, 8, 1), (12, 1, 4), (16, 1, 8), (6, 1, 2), (1, 8, 1)],
)
def test_how_many_of_a_group_share_an_island(size: int, stride: int, local: int) -> None:
    assert MACHINE.spread(size, stride) == local
    assert replace(MACHINE, devices=8).spread(size, stride) == size


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_a_pipelines_bubble_is_gpipes(microbatches: int) -> None:
    """All stages alike and messages for nothing: (p - 1) / (microbatches + p - 1) of the step."""
    shape = replace(SHAPE, vocab=1)
    free = replace(ARITHMETIC, flops_per_s=1e12, attention_flops_per_s=1e12)
    seconds = estimate(free, Work("forward", 8, 64), Layout("tensor", n=1, stage=4, microbatches=microbatches), shape)
    assert seconds.seconds.waiting / seconds.seconds.total == pytest.approx(rivals.bubble(4, microbatches), rel=1e-3)


def test_weights_of_all_ranks_are_what_the_commands_count() -> None:
    """The planner and `helix.config.memory` are one estimate."""
    model = ModelConfig(name="x", layers=4, width=256, heads=16, kv_heads=8, head_dim=32, mlp_hidden=1024, vocab=512)
    work = Work("forward", 16, 64, precision="32-true")
    for layout in (
        Layout("helix", 4, 2, data=2),
        Layout("helix", 1, 8),
        Layout("tensor", n=8),
        Layout("data", data=4),
    ):
        parallel = ParallelConfig(layout.method, layout.m, layout.n, layout.data)
        each = Estimator(to_shape(model), MACHINE, work).memory(layout).weights
        norms = (layout.grid.ranks - 1) * layout.data * (2 * 4 + 1) * 256  # whole on every rank
        assert each * layout.ranks == 4 * (stored_parameters(model, parallel) + norms)


def test_memory_is_the_sum_of_its_parts() -> None:
    for work in WORKS:
        for layout in able(work):
            memory = estimate(MACHINE, work, layout).memory
            assert memory.total == sum(getattr(memory, spec.name) for spec in fields(memory))
            assert (memory.state > 0, memory.cache > 0) == (work.mode == "train", work.mode == "generate")
            seconds = estimate(MACHINE, work, layout).seconds
            assert seconds.total == pytest.approx(sum(getattr(seconds, spec.name) for spec in fields(seconds)))
            assert sum(seconds.shares().values()) == pytest.approx(1)


@pytest.mark.parametrize("grid", [Grid(1, 4), Grid(4, 2), Grid(2, 8)])
@pytest.mark.parametrize("shape", [SHAPE, MOE])
@pytest.mark.parametrize("decode", ["kvseq", "batch"])
def test_an_answers_exchanges_are_the_closed_forms_bytes(grid: Grid, shape: TransformerShape, decode: str) -> None:
    """On one island, one byte a second and no latency: what `helix.generation` counts, for prompts and for steps."""
    answering = Answering(Passes(shape, replace(ARITHMETIC, link_bytes_per_s=1.0), 2))
    layout = Layout("helix", grid.m, grid.n, prefill="batch", decode=decode)
    cost = GenerationCost(pretrained(shape), grid, Phases("batch", layout.cache), 16, 2)
    for moved, (layer, ends) in (
        (cost.prefill_bytes(64), answering.prefill(layout, 16, 64, 1)),
        (cost.step_bytes(), answering.step(layout, 16, 100, 1)),
    ):
        each = layer.forward if isinstance(layer, LayerTime) else layer
        assert each.exchange * shape.layers + ends.exchange == pytest.approx(sum(moved.values()))
    assert answering.cache_bytes(layout, 16, 128) == cost.cache_bytes(128)


def test_experts_are_uneven_by_chance() -> None:
    assert expected_fullest(100, 1) == 100
    assert 100 / 8 < expected_fullest(100, 8) < 100
    assert expected_fullest(1, 128) <= 1
    assert expected_touched(1, 8) == pytest.approx(1)
    assert expected_touched(1000, 8) == pytest.approx(8)
    assert (Seconds(1, 2, 3, 4, 5) * 2).total == (Seconds(1, 2, 3, 4, 5) + Seconds(1, 2, 3, 4, 5)).total == 30


@pytest.mark.parametrize("name", [path.stem for path in sorted((catalogue.CONF / "hardware").glob("*.yaml"))])
def test_every_hardware_is_a_machine(name: str) -> None:
    hardware = catalogue.hardware(name)
    if name == "auto":
        with pytest.raises(ConfigError, match=r"hardware=auto does not say hardware\.matmul_fp32_TFLOP_per_s"):
            machine_of(hardware, "32-true")
        return
    machine = machine_of(hardware, "32-true")
    assert machine.devices == (hardware.hosts or 0) * (hardware.devices_per_host or 0)
    assert 0 < machine.flops_per_s < math.inf
    assert 0 < machine.memory_bytes_per_s < math.inf
    assert machine.link_bytes_per_s > 0


def test_a_figure_of_nothing_is_missing_too() -> None:
    hardware = replace(catalogue.hardware("h200"), link_GB_per_s=0.0)
    with pytest.raises(ConfigError, match=r"does not say hardware\.link_GB_per_s, which a plan of 8 devices"):
        machine_of(hardware, "bf16-true")
    assert machine_of(hardware, "bf16-true", 1).devices == 1


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama3_70b", 70.55), ("qwen3_235b_a22b", 235.09), ("smollm2", 0.1345), ("gemma4_global", 3.364)],
)
def test_known_models_have_their_parameters(name: str, billions: float) -> None:
    assert to_shape(catalogue.model(name)).parameters() / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_what_training_keeps_is_near_what_korthikanti_et_al_count(ranks: int) -> None:
    """Per layer and token 10 + 24 / t bytes of width, 34 / t with sequence parallelism, but for attention's scores.

    Source: Korthikanti et al. (2022), equations 2 and 4 and table 2, in FP16.
    """
    shape = TransformerShape(1, 1024, 16, 16, 64, 4096, vocab=1, rope=False)

    def kept(residual: str, regather: bool) -> float:
        cost = TransformerCost(shape, Grid(1, ranks), AttentionOptions(residual=residual), 8, 128, 2)
        return cost.saved_bytes(regather) / (8 * 128 * 1024)

    assert 1.0 <= kept("replicated", False) / (10 + 24 / ranks) <= 1.2
    assert 1.0 <= kept("sharded", True) / (34 / ranks) <= 1.1
    assert kept("sharded", True) <= kept("sharded", False) <= kept("replicated", False)


def test_sharers_of_a_key_value_head_hold_its_cache_once() -> None:
    """Tensor parallelism on twice as many ranks as key/value heads: whole, or shared out by tokens."""
    work = Work("generate", 16, 512, 32)
    whole, shared = (
        estimate(MACHINE, work, Layout("tensor", n=16, data=4, kv_copies=2, decode=cut)) for cut in ("heads", "kvseq")
    )
    sliced = estimate(MACHINE, work, Layout("helix", 2, 8, data=4, prefill="rows", decode="kvseq"))
    answering = Answering(Passes(SHAPE, replace(ARITHMETIC, link_bytes_per_s=1.0), 2))
    asked, merged = 4 * 32 * 2, 4 * (32 + 1) * 4  # a head of each of 4 samples, to one other rank
    times = [
        answering.step(Layout("tensor", n=16, kv_copies=2, decode=cut), 4, 100, 1)[0] for cut in ("heads", "kvseq")
    ]
    assert times[1].exchange - times[0].exchange == pytest.approx(asked + merged)
    assert whole.memory.cache == 2 * shared.memory.cache == 2 * sliced.memory.cache
    assert whole.memory.weights == shared.memory.weights > sliced.memory.weights
    assert whole.ttft_s == shared.ttft_s
