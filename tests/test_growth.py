"""Pictures and tables of methods beside each other, from reports with invented times and real byte counts."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from sweeps import settings

from helix.command.sweep import REPORT, SweepJob
from helix.config.schema import digest, to_shape
from helix.figures.style import save
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.transformer_cost import TransformerCost
from helix.study import growth
from helix.study.report import (
    Accuracy,
    Measurement,
    Memory,
    MethodLabel,
    Refusal,
    Report,
    Rival,
    Schedules,
    Traffic,
    write,
)
from helix.study.statistics import paired, summarize
from helix.study.sweep import collect, comparisons

SCHEDULES = ("rows", "gather", "perslice")
MS_PER_FLOP, MS_PER_BYTE, MS = 1e-6, 3e-5, 2.0


def job(folder: Path, length: int, m: int = 2) -> SweepJob:
    overrides = (f"workload.seq_len={length}", f"parallel.m={m}")
    return SweepJob(length + m, overrides, settings(m, seq_len=length, schedule="rows"), folder / f"{length}_{m}")


def cost(one: SweepJob, schedule: str) -> TransformerCost:
    grid, work = Grid(one.settings.parallel.m, 1), one.settings.workload
    return TransformerCost(to_shape(one.settings.model), grid, AttentionOptions(schedule), 4, work.seq_len, 4)


def figures(one: SweepJob, schedule: str) -> Measurement:
    """What a machine would measure whose time is exactly a sum of FLOPs, bytes and a constant."""
    form, ranks = cost(one, schedule), range(one.settings.parallel.m)
    moved = [form.bytes(rank) for rank in ranks]
    step_ms = MS + MS_PER_FLOP * sum(form.flops(rank) for rank in ranks)
    step_ms += MS_PER_BYTE * sum(sum(each.values()) for each in moved)
    runs = [step_ms * factor for factor in (0.999, 1.001)]
    busiest = dict(max(moved, key=lambda each: sum(each.values())))
    distance = 0.8 if schedule == "perslice" else None
    name = f"helix_{len(ranks)}x1_{schedule}"
    return Measurement(
        method=MethodLabel(name, len(ranks), 1, Schedules(schedule)),
        tokens_per_s=summarize([1e3 / run for run in runs]),
        step_ms=summarize(runs),
        comm_ms_per_token=None,
        memory_bytes_per_rank=Memory(1000, 200, 1200, 1000),
        comm_bytes_per_rank_per_step=Traffic(busiest, busiest),
        accuracy=Accuracy("mha_fp32_single", 2e-7, distance),
    )


def measure(one: SweepJob) -> SweepJob:
    main, *others = [figures(one, schedule) for schedule in SCHEDULES]
    rivals: list[Rival | Refusal] = [
        Rival(**vars(each), paired=paired(each.step_ms.runs, main.step_ms.runs)) for each in others
    ]
    rivals.append(Refusal(MethodLabel("cp2", 1, 2, Schedules(None)), "NotImplementedError: no"))
    report = Report(
        **vars(main),
        started_at="2026-08-01T12:00:00+00:00",
        world_size=2,
        model={},
        hardware={},
        workload={},
        precision="32-true",
        seed=0,
        baselines=rivals,
        settings=digest(one.settings),
        git_commit=None,
    )
    write(report, one.folder / REPORT)
    return one


@pytest.fixture
def lengths(tmp_path: Path) -> list[SweepJob]:
    return [measure(job(tmp_path, length)) for length in (16, 32, 64, 128)]


def test_points_are_what_the_reports_say(lengths: list[SweepJob]) -> None:
    points = list(growth._points(lengths, growth._length))
    assert {(point.schedule, point.x) for point in points} == {
        (schedule, length) for schedule in SCHEDULES for length in (16, 32, 64, 128)
    }
    for point in points:
        # Bytes inside attention are counted ones, and the curve goes through them.
        assert point.bytes == growth._inside(point.cost)
        assert (point.bytes == 0) == (point.schedule == "perslice")
        assert point.error == (0.8 if point.schedule == "perslice" else 2e-7)


def test_the_fit_finds_the_machine_that_it_was_measured_on(lengths: list[SweepJob]) -> None:
    points = list(growth._points(lengths, growth._length))
    predict = growth._fit(points)
    for point in points:
        assert predict(point.cost) == pytest.approx(point.step_ms, rel=1e-3)
    longer = replace(points[0].cost, length=300)
    flops, moved, _, one = growth._terms(longer)
    assert predict(longer) == pytest.approx(MS * one + MS_PER_FLOP * flops + MS_PER_BYTE * moved, rel=1e-3)


def test_a_sweep_over_lengths_or_slices_draws_its_growth(lengths: list[SweepJob], tmp_path: Path) -> None:
    said = Console(width=80, record=True, file=io.StringIO())
    collect(tmp_path, lengths, said)
    for name in ("growth.png", "ratios.png", "bars.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    text = said.export_text()
    assert "did not run" in text
    assert "growth.png" in text
    slices = [measure(job(tmp_path / "slices", 32, m)) for m in (2, 4, 8)]
    png, csv = tmp_path / "slices" / "growth.png", tmp_path / "slices" / "growth.csv"
    assert growth.draw_growth(slices, png.parent) == [csv, png]
    # What is beside the picture is all of it.
    points = list(growth._points(slices, growth._slices))
    again = save(growth.growth(pd.read_csv(csv), growth._provenance(points)), tmp_path / "again.png")
    assert again.read_bytes() == png.read_bytes()


def test_one_length_is_no_growth(lengths: list[SweepJob], tmp_path: Path) -> None:
    assert growth.draw_growth(lengths[:1], tmp_path) == []


def test_comparisons_have_a_row_for_each_baseline(lengths: list[SweepJob]) -> None:
    frame = comparisons(lengths)
    assert len(frame) == 4 * 3
    refused = frame[frame["baseline"] == "cp2"]
    assert refused["ratio"].isna().all()
    assert set(refused["error"]) == {"NotImplementedError: no"}
    gather = frame[frame["baseline"] == "helix_2x1_gather"].iloc[0]
    assert gather["ratio_low"] <= gather["ratio"] <= gather["ratio_high"]
    assert gather["ratio"] == pytest.approx(
        figures(lengths[0], "gather").step_ms.mean / figures(lengths[0], "rows").step_ms.mean
    )


def test_a_sweep_without_baselines_has_no_comparisons(tmp_path: Path) -> None:
    assert len(comparisons([job(tmp_path, 16)])) == 0
