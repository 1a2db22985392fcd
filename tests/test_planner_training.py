"""The planner's training steps, pipelines' links and other numbers of devices: what each part of them is made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from helix.config.schema import ConfigError
from helix.partition.shape import TransformerShape
from helix.planner import catalogue
from helix.planner.answering import Answering
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import Machine, machine_of
from helix.planner.passes import Passes
from helix.planner.replicas import Replicas
from helix.planner.seconds import Seconds
from helix.planner.work import Estimate, Work

MACHINE = Machine("m", 64, 8, 4e14, 3e14, 8e10, 2e12, 3e11, 4e10, 3e-6, 1e-5, 4e-6)
SHAPE = TransformerShape(4, 256, heads=16, kv_heads=8, head_dim=32, mlp_hidden=1024, vocab=512, gated=True)
MOE = replace(SHAPE, experts=8, top_k=2, mlp_hidden=256)
# One second a FLOP, and everything else for nothing.
ARITHMETIC = Machine("a", 64, 64, 1.0, 1.0, math.inf, math.inf, math.inf, math.inf, 0.0, 0.0, 0.0)


def estimate(machine: Machine, work: Work, layout: Layout) -> Estimate:
    return Estimator(SHAPE, machine, work).estimate(layout)


def test_training_state_is_sharded_and_recomputation_saves_activations() -> None:
    work = Work("train", 64, 512, precision="bf16-mixed")
    plain = Layout("helix", 1, 8, data=8)
    whole, shared = (estimate(MACHINE, work, plain.at(shard_data=flag)).memory for flag in (False, True))
    assert whole.state == 3 * whole.weights
    layer = Estimator(replace(SHAPE, layers=1, vocab=1), MACHINE, work).memory(plain).weights
    assert shared.weights == whole.weights // 8 + layer  # its own part, and the layer that runs
    assert shared.state == 3 * whole.weights // 8 + layer
    gathered = estimate(MACHINE, work, plain.at(shard_data=True, microbatches=2)).memory
    assert gathered.state == 2 * whole.weights // 8 + whole.weights  # gradients accumulate unscattered
    times, kept = zip(
        *(
            (one.seconds.total, one.memory.activations)
            for one in (estimate(MACHINE, work, plain.at(recompute=how)) for how in ("none", "selective", "full"))
        ),
        strict=True,
    )
    assert times[0] < times[1] < times[2]
    assert kept[2] < kept[0]


def test_shared_parameters_are_gathered_twice_and_their_gradients_scattered() -> None:
    """On one byte a second: 3 times (d - 1) / d of a rank's parameters, where an all-reduce sends twice."""
    replicas = Replicas(SHAPE, replace(ARITHMETIC, link_bytes_per_s=1.0), Work("train", 64, 512, precision="32-true"))
    plain = Layout("helix", 1, 2, data=8)
    part = 7 / 8 * 1000 * 4
    assert replicas.exchange(plain, 1000, 1) == pytest.approx(2 * part)
    assert replicas.exchange(plain.at(shard_data=True), 1000, 1) == pytest.approx(3 * part)
    assert replicas.exchange(plain.at(shard_data=True, microbatches=4), 1000, 1) == pytest.approx(9 * part)
    assert replicas.own_parameters(plain.at(shard_data=True), 1000, 1) == 125
    assert replicas.own_parameters(plain, 1000, 1) == 1000
    alone = plain.at(data=1, shard_data=True)
    assert replicas.exchange(alone, 1000, 1) == 0
    assert replicas.memory(alone, 4000, 100, 1) == (4000, 12_000)


def test_experts_that_a_grid_holds_more_than_once_are_summed_inside_it() -> None:
    """8 experts on 16 ranks: two of each, whose gradients are added up; on 8 ranks one."""
    replicas = Replicas(MOE, replace(ARITHMETIC, link_bytes_per_s=1.0), Work("train", 64, 512, precision="32-true"))
    experts = MOE.layers * MOE.expert_parameters * 4
    assert replicas.exchange(Layout("helix", 2, 8), 1e9, 8) == pytest.approx(experts)
    assert replicas.exchange(Layout("helix", 1, 8), 1e9, 8) == 0


def test_adamw_reads_four_numbers_and_writes_three() -> None:
    passes = Passes(SHAPE, replace(ARITHMETIC, memory_bytes_per_s=1.0), 2)
    assert passes.optimizer(10, 4).total == 7 * 10 * 4


def test_experts_that_are_cut_inside_see_all_rows() -> None:
    """One expert of width 256 for everything, on one byte a second: a quarter of its weights, and all rows twice."""
    shape = replace(MOE, experts=1, top_k=1)
    answering = Answering(Passes(shape, replace(ARITHMETIC, flops_per_s=math.inf, memory_bytes_per_s=1.0), 2))
    rows, e = 100, 2
    route = (rows * 256 + 256 + rows) * e
    hidden = rows / 4 * shape.mlp_hidden * shape.mlp_matrices * e
    moved = shape.expert_parameters * e / 4 + 2 * rows * 256 * e
    assert answering._experts(Layout("helix", 1, 4), rows, 1).total == pytest.approx(route + hidden + moved)


@pytest.mark.parametrize(
    ("mode", "layout", "gathered"),
    [
        ("generate", Layout("helix", 1, 4, stage=2), True),  # a pretrained model's stream is whole
        ("generate", Layout("tensor", n=4, stage=2), True),
        ("generate", Layout("tensor", n=4, stage=2, sharded=True), False),
        ("forward", Layout("helix", 1, 4, stage=2), False),
        ("forward", Layout("tensor", n=4, stage=2), True),
        ("forward", Layout("tensor", n=4, stage=2, sharded=True), False),
    ],
)
def test_a_whole_stream_is_gathered_behind_the_link(mode: str, layout: Layout, gathered: bool) -> None:
    machine = replace(ARITHMETIC, flops_per_s=math.inf, attention_flops_per_s=math.inf, link_bytes_per_s=1.0)
    estimator = Estimator(SHAPE, machine, Work(mode, 8, 64, 1 if mode == "generate" else 0))
    hop = estimator._piped(layout, Seconds(), sends=1).exchange
    own = 8 * 64 * 256 * 2 / 4
    assert hop == pytest.approx(2 * (4 * own if gathered else own))


def test_a_machine_of_other_devices_has_their_turns_and_island() -> None:
    hardware = replace(catalogue.hardware("cpu"), devices_per_host=2, ranks_take_turns=True)
    sixteen = machine_of(hardware, "32-true", 16)
    for devices in (1, 2, 8, 32):
        asked, at = machine_of(hardware, "32-true", devices), sixteen.at(devices)
        assert at == asked
        assert at.turns != sixteen.turns  # which are measured, and no multiple of the ranks
    island = replace(catalogue.hardware("dgx_h100"), host_link_GB_per_s=None)
    with pytest.raises(ConfigError, match=r"does not say hardware\.host_link_GB_per_s"):
        machine_of(island, "32-true", 8).at(16)
