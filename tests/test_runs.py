"""`load_runs` on real W&B runs made without a network and on damaged ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from commands import Command

from helix.study import runs as study_runs
from helix.study import wandb_records
from helix.study.runs import DamagedRun, load_runs
from helix.study.wandb_records import columns, numbers, read_run, run_files

# Three runs in folders of their own: one ends well, one raises, one is killed with its report already written.
MADE = """
import json, os, signal, sys
from pathlib import Path
from helix.config.schema import LoggerConfig
from helix.study.tracking import track

CONFIG = {"model": {"name": "tiny", "layers": 2}, "baseline": ["tp2"], "seed": 7, "none": None,
          "note": "a\\x85b\\x1c\\xef", "nest": {"inf": float("inf"), "list": [1, float("-inf")]}}

def make(name, end):
    folder = Path(name)
    folder.mkdir()
    with track(LoggerConfig(kind="wandb", mode="offline"), folder, CONFIG) as tracker:
        about = {"mode": "offline", "path": f"wandb/{tracker.path.name}", "id": tracker.id}
        report = {"method": {"name": name, "m": 2}, "losses": [1.0, 0.5], "started_at": "2026-11-22T10:00:00+00:00"}
        (folder / "report.json").write_text(json.dumps(report | {"wandb": about}))
        tracker.experiment.config.update({"model": {"layers": 4}, "later": True}, allow_val_change=True)
        for step in range(3):
            tracker.log({"train/loss": [1.0, float("nan"), 0.25][step], "rank": {"step_ms": step}}, step=step * 10)
        tracker.log({"validation": 3}, step=30)
        tracker.summary({"tokens_per_s": 12.5, "gone": 1, "final": {"ok": True}})
        del tracker.experiment.summary["gone"]
        end()

def fail():
    raise RuntimeError("on purpose")

make("sweep/finished", lambda: None)
try:
    make("failed", fail)
except RuntimeError:
    pass
make("killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "make.py").write_text(MADE)
    (folder / "sweep").mkdir()
    assert Command(str(folder / "make.py"), cwd=folder).wait() == -9
    return folder


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """A folder `runs` with a copy of the run that ended well, to be damaged."""
    shutil.copytree(made / "sweep" / "finished", tmp_path / "runs" / "0", symlinks=True)
    return tmp_path / "runs"


def file_of(folder: Path) -> Path:
    (file,) = run_files(folder)
    return file


def one(runs: pd.DataFrame) -> pd.Series:
    assert len(runs) == 1
    return runs.iloc[0]


def test_a_run_is_a_row(finished: Path) -> None:
    run = one(load_runs(finished))
    file = file_of(finished)
    assert (f"run-{run.run_id}.wandb", run.path, run.state) == (file.name, str(file.parent), "finished")
    assert pd.Timestamp.now("UTC") - run.started_at < pd.Timedelta("1h")
    config = {"model.name": "tiny", "model.layers": 4, "baseline": ["tp2"], "seed": 7, "later": True, "none": None}
    config |= {"note": "a\x85b\x1c\xef"}  # at whose second and fourth character `splitlines` splits
    config |= {"nest.inf": math.inf, "nest.list": [1, -math.inf]}
    report = {"method.name": "sweep/finished", "method.m": 2, "started_at": "2026-11-22T10:00:00+00:00"}
    summary = {"validation": 3, "train/loss": 0.25, "rank.step_ms": 2, "tokens_per_s": 12.5, "final.ok": True}
    parts: dict[str, dict[str, Any]] = {"config": config, "summary": summary, "report": report}
    logged = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    found = {key: value for key, value in run.items() if not key.startswith("report.wandb.")}
    about = ["run_id", "path", "state", "started_at", "host", "history", "report"]
    assert {key: value for key, value in found.items() if key not in about} == logged
    assert list(found)[:5] + list(found)[-2:] == about
    assert run.report["losses"] == [1.0, 0.5]
    assert one(load_runs(finished, reports=False)).report is None


def test_the_history_is_a_table(finished: Path) -> None:
    history = one(load_runs(finished)).history
    assert list(history) == ["_step", "_runtime", "_timestamp", "rank.step_ms", "train/loss", "validation"]
    assert list(history["_step"]) == [0, 10, 20, 30]
    assert list(history["validation"].dropna()) == [3]
    assert history["train/loss"][0] == 1.0
    assert math.isnan(history["train/loss"][1])  # W&B writes it as a text
    assert history["train/loss"].dtype == float
    assert history["_timestamp"].dt.tz is not None
    assert history["_timestamp"].is_monotonic_increasing


def test_a_killed_run_has_its_report(made: Path) -> None:
    """W&B had written nothing yet."""
    (file,) = (made / "killed").glob("wandb/offline-run-*/*.wandb")
    with pytest.warns(DamagedRun) as seen:
        runs = load_runs(made)
    assert [str(each.message) for each in seen] == [
        f"{file}: it holds no run, as of one that was killed before W&B wrote anything; the report stands for it"
    ]
    assert list(runs["report.method.name"]) == ["killed", "sweep/finished", "failed"]  # by their starts
    assert list(runs["state"]) == ["unfinished", "finished", "failed"]
    assert math.isnan(runs["config.seed"][0])
    assert len(runs.history[0]) == 0
    assert list(runs.history[0]) == list(runs.history[1])[:3]


def test_damaged_files_are_named_and_the_rest_loaded(finished: Path, made: Path) -> None:
    other, killed = (next((made / name).glob("wandb/offline-run-*/*.wandb")) for name in ("failed", "killed"))
    half = other.read_bytes()[: other.stat().st_size // 2]
    bad = {"foreign": b"no run at all", "empty": b"", "killed": killed.read_bytes(), "half": half}
    for name, content in bad.items():
        folder = finished / "multirun" / name / "wandb" / "offline-run-x"
        folder.mkdir(parents=True)
        (folder / f"run-{name}.wandb").write_bytes(content)
    with pytest.warns(DamagedRun) as seen:
        runs = load_runs(finished)
    said = dict(str(each.message).rsplit("/run-", 1)[1].split(".wandb: ", 1) for each in seen)
    assert said.keys() == bad.keys()
    assert said["foreign"].startswith("bad header")
    assert said["half"].endswith("; what it holds is kept")
    assert said["empty"] == said["killed"]
    assert said["empty"].startswith("it holds no run")
    assert all(each.filename == __file__ for each in seen)
    assert list(runs["state"]) == ["finished", "unfinished"]
    assert list(runs["config.seed"]) == [7, 7]
    assert runs.report[1] is None


def test_a_foreign_file_alone_leaves_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "run-x.wandb").write_text("no run at all")
    with pytest.warns(DamagedRun, match="bad header.*; left out"):
        runs = load_runs(tmp_path)
    assert list(runs) == ["run_id", "path", "state", "started_at", "host", "history", "report"]
    assert len(runs) == 0


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "it is no report"),
        ("[1]", "it is no report"),
        ('{"method": {}}', "it is no report .'wandb'.; left out"),
        ('{"wandb": {"id": ["x"]}}', "it is no report .its W&B id is no text but list.; left out"),
        ('{"wandb": {"id": "x"}, "started_at": {}}', "it is no report .its started_at is no text but dict.; left out"),
        (
            '{"wandb": {"id": "x"}, "started_at": "soon"}',
            "it is no report .its started_at, 'soon', is no ISO 8601 time.; left out",
        ),
        ('{"wandb": ' + "[" * 200_000, "it is no report .maximum recursion depth exceeded.*; left out"),
        ('{"wandb": {"id": "another1"}}', "it is of the W&B run another1, which is not in its folder; left out"),
    ],
)
def test_a_report_that_is_not_the_runs_is_left_out(finished: Path, content: str, fault: str) -> None:
    (finished / "0" / "report.json").write_text(content)
    with pytest.warns(DamagedRun, match=f"0/report.json: {fault}"):
        run = one(load_runs(finished))
    assert run.report is None
    assert run["config.seed"] == 7


def test_a_line_that_is_no_record_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = '{"type":"run","run":{"run_id":"a1"}}'
    said = SimpleNamespace(stdout="\n".join([good, '{"cut', '{"a":' + "[" * 200_000, good]), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    records, fault = wandb_records.read_records(tmp_path)
    assert records == [{"type": "run", "run": {"run_id": "a1"}}] * 2
    assert fault is not None
    assert fault.startswith("a record of it cannot be read (maximum recursion depth")


def test_a_run_is_read_whatever_the_locale(finished: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from helix.study.wandb_records import read_run; "
        "run = read_run(Path(sys.argv[1])); print(ascii(run.config['note']), run.fault)"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(file_of(finished))]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert said == "'a\\x85b\\x1c\\xef' None\n"


def test_a_folder_that_cannot_be_read_is_named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mode alone would not keep a superuser out."""
    scandir = os.scandir
    closed = str(finished / "closed" / "deep")
    os.makedirs(closed)

    def refuse(path: str) -> Any:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(DamagedRun, match="closed/deep: Permission denied; left out"):
        assert one(load_runs(finished)).state == "finished"
    with pytest.raises(FileNotFoundError, match=r"no W&B run in .*/deep: Permission denied"):
        load_runs(finished / "closed")


def test_two_values_of_one_name_are_named(finished: Path) -> None:
    report = finished / "0" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"a": {"b": 1}, "a.b": 2}))
    with pytest.warns(DamagedRun, match=r"report.json: it has two values for 'a.b'; the later one is kept"):
        assert one(load_runs(finished))["report.a.b"] == 2
    faults: list[str] = []
    assert study_runs._leaves({"a": {"b": 1}, "a.b": 2, "c": 3}, "x: its config", faults) == {"a.b": 2, "c": 3}
    assert faults == ["x: its config has two values for 'a.b'; the later one is kept"]


def test_numbers_stand_for_their_names_at_any_depth() -> None:
    assert numbers({"a": [1, {"b": "-Infinity"}], "c": "Inf", "d": None}) == {
        "a": [1, {"b": -math.inf}],
        "c": "Inf",
        "d": None,
    }


def test_columns_are_as_long_as_there_are_records() -> None:
    table = columns([{"a": 1}, {"b": {"c": "Infinity"}}, {}])
    assert repr(table) == "{'a': [1, nan, nan], 'b.c': [nan, inf, nan]}"


def test_of_two_reports_of_a_run_the_first_is_kept(finished: Path) -> None:
    report = finished / "0" / "report.json"
    (finished / "0" / "train_report.json").write_text(report.read_text().replace('"m": 2', '"m": 3'))
    with pytest.warns(DamagedRun, match="train_report.json: it is of the W&B run .*, as is .*/report.json; left out"):
        assert one(load_runs(finished))["report.method.m"] == 2


def test_the_training_report_counts_too(finished: Path) -> None:
    (finished / "0" / "report.json").rename(finished / "0" / "train_report.json")
    assert one(load_runs(finished))["report.method.m"] == 2


def test_links_do_not_repeat_a_run(finished: Path) -> None:
    """Neither W&B's own `latest-run` nor links within the folder, in a circle at that."""
    (finished / "0" / "again").symlink_to(finished)
    (finished / "0" / "wandb" / "latest").symlink_to(file_of(finished).parent)
    assert "offline-run-" in one(load_runs(finished)).path
    (finished.parent / "elsewhere").mkdir()
    (finished.parent / "elsewhere" / "link").symlink_to(finished / "0")
    assert one(load_runs(finished.parent / "elsewhere")).report is not None


def test_a_copy_is_left_out_and_another_of_the_same_id_kept(finished: Path) -> None:
    shutil.copytree(finished / "0", finished / "1", symlinks=True)
    with pytest.warns(DamagedRun, match="1/wandb/.*: it is a copy of .*/0/wandb/.*; left out"):
        assert "/0/wandb/" in one(load_runs(finished)).path
    (finished / "0" / "report.json").rename(finished / "report.json")
    with pytest.warns(DamagedRun, match="0/wandb/.*: it is a copy of .*/1/wandb/.*; left out"):
        assert one(load_runs(finished)).report is not None
    file = file_of(finished / "1")
    file.write_bytes(file.read_bytes()[:-20])
    with (
        pytest.warns(DamagedRun, match="what it holds is kept"),
        pytest.warns(DamagedRun, match="it has the run id of .*; both are kept"),
    ):
        assert len(load_runs(finished)) == 2


def test_wandbs_public_command_reads_the_same(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is called where W&B's program is not where it was."""
    file = file_of(finished)
    found = read_run(file)
    wandb_records._reader.cache_clear()
    monkeypatch.setattr(wandb_records, "find_spec", lambda name: SimpleNamespace(origin=str(finished)))
    assert read_run(file) == found
    assert found.fault is None
    assert found.run_id is not None
    wandb_records._reader.cache_clear()


def test_where_there_is_nothing(tmp_path: Path, made: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no W&B run in .*: there is no run-\*\.wandb in it, at any depth"):
        load_runs(tmp_path)
    for nothing in (tmp_path / "none", "", "outputz", made / "make.py"):
        with pytest.raises(FileNotFoundError, match=f"'{nothing}' is neither a folder that holds W&B runs"):
            load_runs(nothing)
