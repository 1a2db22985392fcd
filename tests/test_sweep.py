"""Sweeps: what cannot run is passed over, what was killed goes on, what failed is kept, all of it is in one table."""

from __future__ import annotations

import io
import math
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from helix.config.schema import (
    HardwareConfig,
    InferConfig,
    LoggerConfig,
    ModelConfig,
    ParallelConfig,
    WorkloadConfig,
    digest,
)
from helix.config.sweep import FAILED, REPORT, SKIPPED, Progress, SweepJob, folder_name, keep, labels, outcome
from helix.study.plots import MOST_BARS, bars, draw
from helix.study.report import Accuracy, Memory, Method, Report, Schedules, Traffic, write
from helix.study.statistics import summarize
from helix.study.sweep import collect, render, table

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "model=dense",
    "model.layers=1",
    "model.width=64",
    "model.heads=4",
    "model.head_dim=16",
    "model.mlp_hidden=64",
    "workload.batch_size=4",
    "workload.seq_len=32",
    "workload.iterations=1",
    "workload.runs=2",
    "workload.warmup=0",
    "logger=none",
]
PNG = b"\x89PNG\r\n"


def settings(m: int = 1, n: int = 1, **parallel: int | str) -> InferConfig:
    return InferConfig(
        parallel=ParallelConfig(m=m, n=n, **parallel),  # type: ignore[arg-type]
        model=ModelConfig(name="dense", layers=1, width=64, heads=4, head_dim=16, mlp_hidden=64),
        hardware=HardwareConfig(name="auto", source="this machine"),
        workload=WorkloadConfig(name="small", batch_size=4, seq_len=32, warmup=0, iterations=1, runs=2),
        logger=LoggerConfig(kind="none"),
    )


def a_job(folder: Path, number: int, m: int, n: int, *more: str, reason: str | None = None) -> SweepJob:
    one = settings(m, n)
    if "parallel.data=2" in more:
        one = replace(one, parallel=replace(one.parallel, data=2))
    overrides = ("parallel=helix", f"parallel.m={m}", f"parallel.n={n}", *more)
    return SweepJob(number, overrides, one, folder / f"{number}_helix_{m}x{n}", reason)


def a_report(job: SweepJob, tokens_per_s: float) -> Report:
    parallel = job.settings.parallel
    runs = [tokens_per_s * factor for factor in (0.98, 1.0, 1.02)]
    return Report(
        started_at="2026-08-01T12:00:00+00:00",
        method=Method(f"helix_{parallel.m}x{parallel.n}", parallel.m, parallel.n, Schedules("batch"), parallel.data),
        world_size=parallel.ranks,
        model={"name": "dense", "heads": 4},
        hardware={"name": "auto"},
        workload={"name": "small", "batch_size": 4, "seq_len": 32, "iterations": 1},
        precision="32-true",
        seed=0,
        tokens_per_s=summarize(runs),
        step_ms=summarize([128e3 / run for run in runs]),
        comm_ms_per_token=summarize([0.1, 0.11, 0.12]),
        memory_bytes_per_rank=Memory(weights=1000, activations_peak=200, peak=1200, predicted=1000),
        comm_bytes_per_rank_per_step=Traffic({"all_to_all/qkv": 300, "all_gather/out": 100}, {}),
        accuracy=Accuracy("mha_fp32_single", 2e-7),
        settings=digest(job.settings),
        git_commit=None,
    )


def measured(job: SweepJob, tokens_per_s: float) -> SweepJob:
    write(a_report(job, tokens_per_s), job.folder / REPORT)
    return job


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


def test_outcomes(tmp_path: Path) -> None:
    job = a_job(tmp_path, 0, 1, 1)
    assert outcome(job).status == "open"
    job.folder.mkdir()
    keep(job.folder, FAILED, reason="it broke", traceback="")
    assert (outcome(job).status, outcome(job).reason) == ("failed", "it broke")
    keep(job.folder, SKIPPED, reason="too large")
    assert (outcome(job).status, outcome(job).reason) == ("skipped", "too large")
    measured(job, 1.0)
    # Also if this machine has no room for it now.
    assert outcome(replace(job, reason="too large now")).status == "done"
    assert sorted(path.name for path in job.folder.iterdir()) == [FAILED, REPORT, SKIPPED]


def test_the_same_words_have_the_same_folder() -> None:
    words = ["parallel=helix", "parallel.m=1,2", "parallel.n=range(1,3)", "model=dense", "seed=1"]
    name = folder_name(words)
    assert name.startswith("helix_dense_m_n_")
    assert name == folder_name([*words, "hydra.verbose=true", "hydra/launcher=joblib"])
    assert name != folder_name([*words[:-1], "seed=2"])
    assert name != folder_name(words[::-1])  # another order of jobs
    assert name != folder_name([*words, "hydra.sweeper.params={seed: '1,2'}"])
    assert folder_name(["parallel=helix_1x2,helix_2x1"]).startswith("parallel_")


def test_labels_tell_jobs_apart(tmp_path: Path) -> None:
    jobs = [a_job(tmp_path, 0, 1, 2), a_job(tmp_path, 1, 2, 1)]
    assert labels(jobs) == ["helix_1x2", "helix_2x1"]
    jobs = [a_job(tmp_path, number, 1, 2, f"seed={number}", "model=dense") for number in range(2)]
    assert labels(jobs) == ["helix_1x2 seed=0", "helix_1x2 seed=1"]


def test_progress_counts_and_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [measured(a_job(tmp_path, 0, 1, 1), 1.0), a_job(tmp_path, 1, 1, 2), a_job(tmp_path, 2, 2, 1)]
    jobs.append(a_job(tmp_path, 3, 3, 1, reason="no"))
    began = 1_785_585_600  # the report's started_at
    os.utime(jobs[0].folder / REPORT, (began + 60, began + 60))
    progress = Progress(jobs, counts=True)
    progress.done_before(0, jobs[0].settings)
    progress.begin(1, jobs[1].settings)
    progress.end("done", 90)
    progress.begin(2, jobs[2].settings)
    progress.end("failed", 3)
    progress.skipped(3, jobs[3].settings, "m=3 does not divide")
    assert capsys.readouterr().err.splitlines() == [
        "job 1 of 4: helix_1x1 already measured",
        "job 2 of 4: helix_1x2  (1 skipped, 1 done, about 2 min left)",
        "job 3 of 4: helix_2x1  (1 skipped, 2 done, about 75 s left)",
        "job 4 of 4: helix_3x1 skipped: m=3 does not divide",
    ]
    Progress(None, counts=True).begin(7, jobs[1].settings)
    assert capsys.readouterr().err == "job 8: helix_1x2\n"
