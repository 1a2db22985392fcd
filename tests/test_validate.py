"""Predictions held against ranks: curves between measured points, what is made of outcomes, and a real case."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.__main__ import main
from helix.calibration.cases import cases
from helix.calibration.outcomes import Outcome, Validation
from helix.calibration.validate import validate
from helix.calibration.validate_command import write_error
from helix.calibration.validate_table import render
from helix.config.hardware import (
    HardwareConfig,
    MeasuredAttention,
    MeasuredExchange,
    MeasuredProducts,
    MeasuredTurns,
)
from helix.config.schema import ConfigError
from helix.figures.predictions import predictions
from helix.planner import catalogue
from helix.planner.curves import Curve, exchanges
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import machine_of
from helix.planner.work import Work
from helix.study.alternate import Rounds

CPU = catalogue.hardware("cpu")


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e5), st.booleans())
def test_a_curve_goes_through_its_points_and_stays_between_them(
    values: list[float], place: float, proportional: bool
) -> None:
    curve = Curve(tuple(10.0**power for power in range(len(values))), tuple(values), proportional)
    for at, value in zip(curve.at, values, strict=True):
        assert curve(at) == pytest.approx(value)
    if place <= curve.at[-1]:
        assert min(values) * (1 - 1e-9) <= curve(place) <= max(values) * (1 + 1e-9)
    else:
        assert curve(place) == pytest.approx(values[-1] * (place / curve.at[-1] if proportional else 1))


def test_collectives_are_read_between_groups_and_jobs_that_were_measured() -> None:
    rows = [
        MeasuredExchange("all_gather", ranks, group, [100, 1000], [10.0 * ranks * group, 20.0 * ranks * group])
        for ranks in (2, 4)
        for group in (2, 4)
        if group <= ranks
    ]
    found = exchanges(rows)
    assert found is not None
    assert found.seconds("all_gather", 100, 2, 2) == pytest.approx(40e-6)
    assert found.seconds("all_gather", 1, 2, 2) == pytest.approx(40e-6), "never below the smallest exchange"
    assert found.seconds("all_gather", 2000, 2, 4) == pytest.approx(320e-6), "in proportion to the bytes beyond"
    assert found.seconds("all_gather", 100, 2, 8) == pytest.approx(160e-6), "and to the ranks that share the cores"
    three = found.seconds("all_gather", 100, 3, 4)
    assert found.seconds("all_gather", 100, 2, 4) < three < found.seconds("all_gather", 100, 4, 4)
    assert exchanges([]) is None


def test_ranks_on_cores_take_turns() -> None:
    unhurried = replace(CPU, turns=MeasuredTurns())
    alone, many = (machine_of(unhurried, "32-true", ranks) for ranks in (2, 8))
    assert many.matmul(1e9, 1e6, 64) == pytest.approx(4 * alone.matmul(1e9, 1e6, 64))
    slower = replace(CPU, turns=MeasuredTurns([2, 8], [1.0, 1.5], [1.0, 1.5], [1.0, 1.5]))
    assert machine_of(slower, "32-true", 8).matmul(1e9, 1e6, 64) == pytest.approx(6 * alone.matmul(1e9, 1e6, 64))
    assert many.spread(8, 1) == 8, "all ranks share the host"


def test_tensor_parallelism_on_cores_pays_for_its_dispatch() -> None:
    shape, work = catalogue.shape(catalogue.model("dense"), "forward"), Work("forward", 16, 32, precision="32-true")
    tensor = Layout("tensor", n=4)
    for layout, times in (
        (tensor, 1),
        (replace(tensor, sharded=True), 1),
        (Layout("helix", 2, 2), 0),
        (Layout("data", data=4), 0),
    ):
        seconds = [
            Estimator(shape, machine_of(replace(CPU, dtensor_us=us), "32-true", 4), work).estimate(layout).seconds
            for us in (0.0, 5000.0)
        ]
        turns = machine_of(CPU, "32-true", 4).turns
        assert seconds[1].total - seconds[0].total == pytest.approx(times * shape.layers * 5e-3 * turns)
        assert seconds[1].dispatch == pytest.approx(times * shape.layers * 5e-3 * turns)


def test_a_stage_that_waits_leaves_its_turns_to_the_others() -> None:
    shape, work = catalogue.shape(catalogue.model("dense"), "forward"), Work("forward", 16, 32, precision="32-true")
    layout = Layout("tensor", n=4, stage=2, microbatches=4)
    for hardware, part in ((CPU, 0.0), (replace(CPU, ranks_take_turns=False, devices_per_host=8), 1 / 5)):
        seconds = Estimator(shape, machine_of(hardware, "32-true", 8), work).estimate(layout).seconds
        assert seconds.waiting / (seconds.matmul + seconds.attention + seconds.memory + seconds.waiting) >= part * 0.9
        assert (seconds.waiting == 0) == (part == 0)


def test_measured_shares_go_before_the_stated_ones() -> None:
    hardware = replace(
        catalogue.hardware("h200"),
        matmul_share=1.0,
        kernel_us=0.0,
        memory_GB_per_s=1e9,
        products=MeasuredProducts([16, 256], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]),
        attention=[MeasuredAttention(64, [128], [0.5], [0.5], [0.5])],
    )
    machine = machine_of(hardware, "bf16-true", 1)
    assert machine.matmul(1e12, 0, 16) == pytest.approx(machine.matmul(1e12, 0, 256) * 9)
    assert machine.attention(1e12, 0, 64, 128) == pytest.approx(1e12 / (0.5 * 989e12))


def _outcome(case: str, layout: str, predicted: float, measured: float, **changes: object) -> Outcome:
    one = Outcome(
        case, layout, 2, layout in ("helix_1x2", "dp2"), predicted, measured, (measured, measured), 100, 100, 100, True
    )
    return replace(one, **changes)  # type: ignore[arg-type]


FOUND = Validation(
    "m",
    (
        _outcome("a", "helix_1x2", 10, 12),
        _outcome("a", "tp2", 20, 10, traced_bytes=None),
        _outcome("b", "dp2", 30, 30),
        _outcome("b", "helix_2x1_rows", 40, 50, traced_bytes=90),
    ),
)


def test_outcomes_are_summed_up() -> None:
    assert FOUND.tau == pytest.approx((5 - 1) / 6)
    assert FOUND.error == pytest.approx((0.2 + 1 / 6) / 2)
    assert FOUND.memory_error == 0
    assert [(one.chosen, one.best, one.good) for one in FOUND.choices] == [
        ("helix_1x2", "tp2", False),
        ("dp2", "dp2", True),
    ]
    assert FOUND.good_choices == 0.5
    assert FOUND.tau_within == pytest.approx(0)
    refused = Validation("m", FOUND.outcomes[1:])
    assert [one.chosen for one in refused.choices] == ["what cannot run", "dp2"]
    assert refused.good_choices == 0.5
    assert FOUND.missed() == []
    missed = FOUND.missed(least_tau=0.9, most_error=0.1, most_memory_error=0.1, least_good=0.9)
    assert [words.split(",")[0] for words in missed] == [
        "Kendall's tau 0.67",
        "median error 0.183",
        "good choices 0.50",
    ]
    worse = Validation("m", (*FOUND.outcomes, _outcome("b", "x", 1, 1, bytes_agree=False)))
    assert worse.missed() == ["bytes differ"]


def test_outcomes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=80).print(render(FOUND))
    shown = capsys.readouterr().out
    assert "helix_2x1_rows" in shown
    assert "1 of 2 cases" in " ".join(shown.split())
    assert [axes.get_xscale() for axes in predictions(FOUND.as_dict()).axes] == ["log"]


def test_the_error_is_written_among_other_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("# about\nname: m # its name\ntime_error_share: null # never\nranks_take_turns: true\n")
    write_error(path, 0.1234)
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# about", "name: m # its name"]
    assert lines[2].startswith("time_error_share: 0.123 #")
    assert lines[3] == "ranks_take_turns: true"


def test_a_case_is_measured_on_ranks() -> None:
    case = next(one for one in cases(CPU, "cpu", 2, 3) if one.job.workload.seq_len == 32)
    found = validate("cpu", [case], "cpu", Rounds(2, warmup=1))
    assert [one.layout for one in found.outcomes] == list(case.layouts)
    assert found.bytes_agree
    assert all(0 < one.measured_ms < 60_000 and math.isfinite(one.error) for one in found.outcomes)
    assert found.memory_error < 0.3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cpuu"], "there is no hardware=cpuu (did you mean cpu?)"),
        (["auto"], "does not say hardware.matmul_fp32_TFLOP_per_s"),
        (["cpu", "--ranks", "1"], "--ranks must be 2 to"),
        (["cpu", "--rounds", "1"], "an interval needs --rounds of at least 2"),
        (["cpu", "--layouts", "1"], "--layouts must be at least 2"),
        (["cpu", "--device", "cuda"], "--device cuda needs a GPU"),
        (["l40s", "--write"], "--write puts this machine's error into"),
        (["cpu", "--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_validated(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["validate", *words])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_a_file_that_is_no_hardware(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nspeed: 3\n")
    with pytest.raises(ConfigError, match=r"x\.yaml is no hardware file"):
        catalogue.read(path)
    assert isinstance(catalogue.read(Path(catalogue.check_named("hardware", "cpu"))), HardwareConfig)
