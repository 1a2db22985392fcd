"""Sweeps as a user has them: what was killed goes on, what failed is tried again, what is done is not repeated."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from commands import ROOT, Command
from sweeps import PNG, TINY

from helix.command.sweep import FAILED, REPORT


def start(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> Command:
    return Command(str(ROOT / "infer.py"), "-m", *overrides, cwd=folder, env={"COLUMNS": "100", **(env or {})})


def finish(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    process = start(folder, *overrides, env=env)
    out, err = process.communicate(timeout=90)
    return process.wait(0), out, err


def reports(folder: Path) -> dict[str, tuple[int, str]]:
    """Of each report when it was written and what it says."""
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_text()) for path in folder.rglob(REPORT)}


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    # One head has no two groups, so that two of four grids cannot run.
    words = ["parallel=helix", "parallel.m=1,2", "parallel.n=1,2", *TINY, "model.heads=1"]
    process = start(tmp_path, *words)
    deadline = time.monotonic() + 60
    while "\njob 3 of 4: helix_2x1" not in process.read()[1]:
        assert time.monotonic() < deadline, process.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # a session of its own: its ranks too
    process.wait(10)
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
