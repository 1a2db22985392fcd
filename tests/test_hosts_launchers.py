"""Sweeps whose jobs run in other processes than the one that composed them: Submitit's, for SLURM."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import ROOT
from hydra import compose, initialize_config_dir

from helix.command.compose import prepare
from helix.config.schema import InferConfig

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
pytestmark = pytest.mark.hosts
TINY = ["model=tiny", "logger=none", "workload.runs=2", "workload.batch_size=4", "workload.seq_len=16"]


@pytest.mark.timeout(200)
def test_submitit_runs_the_jobs_of_a_sweep(tmp_path: Path) -> None:
    """Its local executor, which differs from that of SLURM in who starts the processes."""
    words = ["hydra/launcher=submitit_local", "parallel=helix_1x2,helix_2x1", *TINY, f"hydra.sweep.dir={tmp_path}"]
    command = [sys.executable, "infer.py", "-m", *words]
    ended = subprocess.run(command, cwd=ROOT, timeout=180, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["helix_1x2", "helix_2x1"]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)


def test_the_launcher_slurm_is_submitits_with_a_job_at_a_time() -> None:
    prepare([], "infer", InferConfig)  # which tells Hydra of its schema
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        launcher = compose("infer", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.array_parallelism) == (1, 1, 1)
