"""Sweeps: what cannot run is passed over, an error ends its job alone, ranks agree, and one runs at a time."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ROOT
from sweeps import TINY, a_job, measured

from helix.command.cli import command, stop
from helix.command.job import Agree, Task
from helix.command.multirun import _held
from helix.command.sweep import FAILED, REPORT, SKIPPED, Progress, folder_name, keep, labels, outcome
from helix.config import environment
from helix.config.schema import InferConfig


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


def test_a_sweep_that_runs_is_not_started_twice(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(monkeypatch, "parallel.m=1", "seed=0,1")[1] == 0
    [folder] = (machine / "multirun").iterdir()
    temporary = machine / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with _held(folder):
        assert sweep(monkeypatch, "parallel.m=1", "seed=0,1") == ([], 2)
    assert "this sweep is running already" in capsys.readouterr().err
    assert len(sweep(monkeypatch, "parallel.m=1", "seed=0,1")[0]) == 2
    assert list(temporary.iterdir()) == [], "refused or not, a sweep takes its lock along"
