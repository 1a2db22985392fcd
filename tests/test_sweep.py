"""Sweeps: what cannot run is passed over, what was killed goes on, what failed is kept, all of it is in one table."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from helix.command.cli import command, stop
from helix.command.job import Agree, Task
from helix.command.multirun import _held
from helix.command.sweep import FAILED, REPORT, SKIPPED, Progress, SweepJob, folder_name, keep, labels, outcome
from helix.config import environment
from helix.config.schema import (
    HardwareConfig,
    InferConfig,
    LoggerConfig,
    ModelConfig,
    ParallelConfig,
    WorkloadConfig,
    digest,
)
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


# In this process, with a task that only notes what it was called with.


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for variable in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(environment, "free_memory_bytes", lambda: 10**12)
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, task: Task | None = None, agree: Agree | None = None
) -> tuple[list[InferConfig], object]:
    """The settings that the task of `infer.py -m` was called with, and the exit code."""
    calls: list[InferConfig] = []

    @command("infer", conf=ROOT / "conf", agree=agree)
    def main(one: InferConfig, run_dir: Path) -> None:
        calls.append(one)
        if task is not None:
            task(one, run_dir)

    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # no handler outlives the test
    monkeypatch.setattr(sys, "argv", ["infer.py", "-m", "parallel=helix", "parallel.n=1", *arguments, *TINY, *quiet])
    try:
        main()
    except SystemExit as ended:
        return calls, ended.code
    return calls, 0


def test_what_cannot_run_is_passed_over_with_its_reason(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, code = sweep(monkeypatch, "parallel.m=1,3,2")
    assert code == 0
    assert [one.parallel.m for one in calls] == [1, 2]
    [folder] = (machine / "multirun").iterdir()
    assert folder.name.startswith("helix_dense_m_")
    assert {one.logger.group for one in calls} == {folder.name}
    reason = json.loads((folder / "1_helix_3x1" / SKIPPED).read_text())["reason"]
    assert "m=3 does not divide" in reason
    assert f"job 2 of 3: helix_3x1 skipped: {reason}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["parallel.m=3,5"], "none of 2 jobs can run; job 0 (parallel=helix parallel.n=1 parallel.m=3"),
        (["parallel.m=1,2", "precision=32-true,33-true"], "precision cannot be '33-true'"),
        (["parallel.m=1,0"], "parallel.m must be at least 1, not 0"),
        (["parallel.m=1,2", "parallel.k=1"], "there is no key parallel.k"),
    ],
)
def test_what_refuses_a_whole_sweep(
    arguments: list[str],
    said: str,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls, code = sweep(monkeypatch, *arguments)
    assert (calls, code) == ([], 2)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert list(machine.iterdir()) == []


def test_an_error_ends_its_job_and_ctrl_c_the_sweep(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors: dict[int, BaseException] = {1: RuntimeError("two\nlines"), 2: KeyboardInterrupt()}

    def task(one: InferConfig, run_dir: Path) -> None:
        if one.seed == 3:
            stop("rank 0 was killed", code=1)
        if one.seed in errors:
            raise errors[one.seed]

    calls, code = sweep(monkeypatch, "parallel.m=1", "seed=1,3,2,0", task=task)
    assert ([one.seed for one in calls], code) == ([1, 3, 2], 130)
    [folder] = (machine / "multirun").iterdir()
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{FAILED}"))]
    assert [content["reason"] for content in kept] == ["RuntimeError: two lines", "rank 0 was killed"]
    assert "RuntimeError: two" in kept[0]["traceback"]
    del errors[2]
    calls, code = sweep(monkeypatch, "parallel.m=1", "seed=1,3,2,0", task=task)
    assert ([one.seed for one in calls], code) == ([1, 3, 2, 0], 1)
    assert "2 of 4 jobs failed (helix_1x1 seed=1, helix_1x1 seed=3)" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_of_a_launcher_run_what_rank_0_found_open(
    rank: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    found: list[list[str]] = []

    def agree(words: list[str]) -> list[str]:
        found.append(words)
        return ["done", "open", "done"]

    calls, code = sweep(monkeypatch, "parallel.m=2", "seed=0,1,2", agree=agree)
    assert ([one.seed for one in calls], code) == ([1], 0)
    assert found == [["open", "open", "open"]]
    assert list(machine.iterdir()) == ([machine / "multirun"] if rank == "0" else [])


# As a user has it.


def start(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    arguments = [sys.executable, str(ROOT / "infer.py"), "-m", *overrides]
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    process = start(folder, *overrides, env=env)
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def reports(folder: Path) -> dict[str, tuple[int, str]]:
    """Of each report when it was written and what it says."""
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_text()) for path in folder.rglob(REPORT)}


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    # One head has no two groups, so that two of four grids cannot run.
    words = ["parallel=helix", "parallel.m=1,2", "parallel.n=1,2", *TINY, "model.heads=1"]
    process = start(tmp_path, *words)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("job 3 of 4: helix_2x1"):
            break
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = reports(tmp_path)
    assert list(before) == ["0_helix_1x1"]

    code, out, err = finish(tmp_path, *words)
    assert code == 0, err
    said = [line for line in err.splitlines() if line.startswith("job")]
    assert said[0] == "job 1 of 4: helix_1x1 already measured"
    assert said[1].startswith("job 2 of 4: helix_1x2 skipped: helix_1x2 cannot partition")
    assert said[2].startswith("job 3 of 4: helix_2x1  (2 skipped, 1 done, about ")
    after = reports(tmp_path)
    assert sorted(after) == ["0_helix_1x1", "2_helix_2x1"]
    assert after["0_helix_1x1"] == before["0_helix_1x1"]
    assert "2 of 4 jobs cannot run here:" in out

    code, out, err = finish(tmp_path, *words)
    assert code == 0, err
    assert "already measured" in err
    assert "to measure anew delete that folder" in err
    assert reports(tmp_path) == after
    [folder] = (tmp_path / "multirun").iterdir()
    frame = pd.read_parquet(folder / "sweep.parquet")
    assert list(frame["status"]) == ["done", "skipped", "done", "skipped"]
    assert (frame["tokens_per_s"] > 0).sum() == 2
    for name in ("heatmap.png", "bars.png"):
        assert (folder / name).read_bytes().startswith(PNG)
        assert name in out


@pytest.mark.slow
def test_a_job_that_fails_does_not_end_the_sweep(tmp_path: Path) -> None:
    words = ["parallel=helix", "parallel.m=1,2", "parallel.n=1", f"hydra.sweep.dir={tmp_path}/here", *TINY]
    obstacle = tmp_path / "here" / "0_helix_1x1" / REPORT
    obstacle.mkdir(parents=True)  # a folder where the report should go
    code, _, err = finish(tmp_path, *words)
    assert code == 1
    assert err.splitlines()[-1] == (
        "infer.py: error: 1 of 2 jobs failed (helix_1x1); the same command tries them again"
    )
    assert "IsADirectoryError" in json.loads((obstacle.parent / FAILED).read_text())["reason"]
    frame = pd.read_csv(tmp_path / "here" / "sweep.csv")
    assert list(frame["status"]) == ["failed", "done"]
    obstacle.rmdir()
    before = reports(tmp_path)
    code, _, err = finish(tmp_path, *words)
    assert code == 0, err
    assert "job 2 of 2: helix_2x1 already measured" in err
    assert reports(tmp_path)["1_helix_2x1"] == before["1_helix_2x1"]
    assert not (obstacle.parent / FAILED).exists()
    assert list(pd.read_csv(tmp_path / "here" / "sweep.csv")["status"]) == ["done", "done"]


SWEEPER = '''
from dataclasses import dataclass
from pathlib import Path
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class TwoSweeper(Sweeper):
    """Chooses its second job by the first one's result, as those that optimise do."""
    def setup(self, *, hydra_context, task_function, config):
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments):
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        first = self.launcher.launch([[*arguments, "parallel.m=1"]], 0)[0].return_value
        more = "parallel.m=3" if first > 0 else "parallel.m=2"
        second = self.launcher.launch([[*arguments, more]], 1)[0].return_value
        print("returned", first > 0, second != second)

@dataclass
class Conf:
    _target_: str = "hydra_plugins.two.TwoSweeper"

ConfigStore.instance().store(group="hydra/sweeper", name="two", node=Conf)
'''


def test_a_sweeper_that_chooses_as_it_goes(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins" / "hydra_plugins"
    plugins.mkdir(parents=True)
    (plugins / "two.py").write_text(SWEEPER)
    code, out, err = finish(
        tmp_path, "hydra/sweeper=two", "parallel=helix", "parallel.n=1", *TINY, env={"PYTHONPATH": str(plugins.parent)}
    )
    assert code == 0, err
    assert "returned True True" in out
    assert [line[:31] for line in err.splitlines() if line.startswith("job")] == [
        "job 1: helix_1x1",
        "job 2: helix_3x1 skipped: helix",
    ]
    [folder] = (tmp_path / "multirun").iterdir()
    assert list(pd.read_csv(folder / "sweep.csv")["status"]) == ["done", "skipped"]


def test_a_sweep_that_runs_is_not_started_twice(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(monkeypatch, "parallel.m=1", "seed=0,1")[1] == 0
    [folder] = (machine / "multirun").iterdir()
    with _held(folder):
        assert sweep(monkeypatch, "parallel.m=1", "seed=0,1") == ([], 2)
    assert "this sweep is running already" in capsys.readouterr().err
    assert len(sweep(monkeypatch, "parallel.m=1", "seed=0,1")[0]) == 2
