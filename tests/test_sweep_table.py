"""A sweep's table and plots: a row for every job, every number whole, a picture for each question."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from sweeps import PNG, a_job, a_report, measured

from helix.command.sweep import FAILED, REPORT, SweepJob, keep
from helix.figures.sweep import MOST_BARS, bars
from helix.study.plots import draw
from helix.study.sweep import collect, render, table


def grid_sweep(folder: Path) -> list[SweepJob]:
    """3 x 3 grids, of which one cannot run, one failed and one was not begun."""
    jobs = []
    for number, (m, n) in enumerate((m, n) for m in (1, 2, 4) for n in (1, 2, 4)):
        job = a_job(folder, number, m, n, reason="m=4 does not divide" if (m, n) == (4, 4) else None)
        if (m, n) == (2, 2):
            job.folder.mkdir(parents=True)
            keep(job.folder, FAILED, reason="RuntimeError: no", traceback="")
        elif (m, n) not in ((4, 4), (4, 2)):
            measured(job, 1000.0 * (number + 1))
        jobs.append(job)
    return jobs


def rendered(frame: pd.DataFrame, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(frame, width))
    return console.export_text()


def test_collect_has_a_row_for_every_job(tmp_path: Path) -> None:
    jobs = grid_sweep(tmp_path)
    console = Console(width=100, file=io.StringIO(), record=True)
    frame = collect(tmp_path, jobs, console)
    assert list(frame["job"]) == list(range(9))
    assert list(frame["status"]) == ["done"] * 4 + ["failed", "done", "done", "open", "skipped"]
    first = frame.iloc[0]
    low, high = a_report(jobs[0], 1000.0).tokens_per_s.ci95
    assert (first.tokens_per_s, first.tokens_per_s_low, first.tokens_per_s_high) == pytest.approx((1000, low, high))
    assert (first.method, first.m, first.n, first.data, first.stage, first.schedule) == (
        "helix_1x1",
        1,
        1,
        1,
        1,
        "batch",
    )
    assert (first.weights_bytes, first.peak_bytes, first.sent_bytes, first.relative_error) == (1000, 1200, 400, 2e-7)
    assert (first.model, first.batch_size, first.seq_len, first.world_size) == ("dense", 4, 32, 1)
    assert first.overrides == "parallel=helix parallel.m=1 parallel.n=1"
    assert frame.iloc[4].reason == "RuntimeError: no"
    assert frame.iloc[8].reason == "m=4 does not divide"
    assert (frame.iloc[8].method, frame.iloc[8].world_size) == ("helix_4x4", 16)
    assert math.isnan(frame.iloc[8].tokens_per_s)
    for read in (pd.read_csv(tmp_path / "sweep.csv"), pd.read_parquet(tmp_path / "sweep.parquet")):
        assert list(read.columns) == list(frame.columns)
        assert list(read["tokens_per_s"].fillna(0)) == list(frame["tokens_per_s"].fillna(0))
        assert list(read["reason"].fillna("")) == list(frame["reason"].fillna(""))
    for name in ("heatmap.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    said = console.export_text()
    assert "1 of 9 jobs cannot run here:" in said
    assert "heatmap.png" in said


@pytest.mark.parametrize("content", ["", "{", "[]", '"report"', "{}", '{"settings": "another"}', b"\xff\xfe"])
def test_a_report_that_is_not_of_this_job_counts_for_nothing(content: str | bytes, tmp_path: Path) -> None:
    jobs = [measured(a_job(tmp_path, 0, 1, 1), 1000.0), a_job(tmp_path, 1, 1, 2)]
    jobs[1].folder.mkdir()
    path = jobs[1].folder / REPORT
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    frame = collect(tmp_path, jobs, Console(file=io.StringIO()))
    assert list(frame["status"]) == ["done", "open"]
    assert "not a report of this job" in frame["reason"][1]


def test_a_sweep_of_which_nothing_was_measured_has_a_table(tmp_path: Path) -> None:
    jobs = [a_job(tmp_path, 0, 1, 1), a_job(tmp_path, 1, 2, 2, reason="no")]
    frame = collect(tmp_path, jobs, Console(file=io.StringIO()))
    assert list(frame["status"]) == ["open", "skipped"]
    assert not (tmp_path / "bars.png").exists()
    assert len(table([])) == 0


def test_the_terminals_table_fits_and_cuts_no_number(tmp_path: Path) -> None:
    jobs = [
        measured(a_job(tmp_path, number, 16, 16, "workload.batch_size=1024", f"seed={number}"), 1_234_567.0)
        for number in range(12)
    ]
    frame = table(jobs)
    for width in (80, 100):
        said = rendered(frame, width)
        assert max(len(line) for line in said.splitlines()) <= width
        assert "…" not in said
        assert said.count("1,234,567") == 12


def test_each_combination_of_other_keys_has_a_heat_map(tmp_path: Path) -> None:
    jobs, number = [], 0
    for data in (1, 2):
        for m in (1, 2):
            for n in (1, 2):
                jobs.append(measured(a_job(tmp_path, number, m, n, f"parallel.data={data}"), 1000.0 + number))
                number += 1
    names = [path.name for path in draw(table(jobs), tmp_path)]
    assert names == ["heatmap_parallel.data=1.png", "heatmap_parallel.data=2.png", "bars.png"]
    # n alone varies: nothing to map
    assert [path.name for path in draw(table(jobs[:2]), tmp_path)] == ["bars.png"]


def test_bars_show_the_fastest_and_say_so(tmp_path: Path) -> None:
    jobs = [measured(a_job(tmp_path, seed, 1, 1, f"seed={seed}"), 1000.0 + seed) for seed in range(MOST_BARS + 5)]
    chart = bars(table(jobs))
    axes = chart.axes[0]
    assert len(axes.patches) == MOST_BARS
    assert f"the fastest {MOST_BARS} of {MOST_BARS + 5}" in axes.get_title("left")
    assert axes.get_yticklabels()[0].get_text() == f"helix_1x1 seed={MOST_BARS + 4}"
