"""Logged runs as one table: offline ones from a folder, online ones from a W&B project.

runs = load_runs("outputs")
runs.groupby("report.method.name")["report.tokens_per_s.mean"].describe()
runs.history[0].plot(x="_step", y="loss")
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from helix.config.schema import InferConfig
from helix.config.train_schema import TrainConfig
from helix.study.wandb_records import NAME, RunRecords, flat, numbers, own, read_run, run_files

_ABOUT = ["run_id", "path", "state", "started_at", "host"]
_CLOCK = ["_step", "_runtime", "_timestamp"]
_REPORTS = (InferConfig.REPORT, TrainConfig.REPORT)
_PROJECT = re.compile(r"[\w.-]+/[\w.-]+")


class DamagedRun(UserWarning):
    """A file of a run, or its report, that could not be read in whole; the message names it and its fault."""


@dataclass(frozen=True)
class _Run:
    path: str
    records: RunRecords
    report: dict[str, Any] | None = None


def load_runs(source: str | Path, *, reports: bool = True) -> pd.DataFrame:
    """One row for each W&B run, in the order in which they started.

    Columns: `run_id`; `path`, the run's W&B folder, or "entity/project/id"; `state`: "finished", "failed", "killed",
    "unfinished" (still going on, or cut short), online also W&B's "running" and "crashed"; `started_at` in UTC;
    `host`; the dotted `config.<key>` and `summary.<key>` as logged, and `report.<key>`, the scalars of the report
    beside the W&B folder; `history`, a DataFrame with a row for each logged record and W&B's `_step`, `_runtime` (s)
    and `_timestamp` (UTC) first; `report`, the whole report as a dict, or None. What a run does not have is missing
    (NaN). Runs without W&B (`logger=none`) are not among them.

    Every damaged file is named in a `DamagedRun` warning. What it still holds is kept; where that is nothing, the row
    is the report's, if one names the run, else there is none.

    Args:
        source: a folder, searched at any depth, or a W&B project, "entity/project", if there is no such folder.
        reports: whether to read the reports. Online runs have none.

    Raises:
        FileNotFoundError: if there is no such folder, or no run in it.
        ValueError: if W&B has no such project, or no account is set up.
    """
    folder = Path(source)
    faults: list[str] = []
    if folder.is_dir():
        runs = list(_offline(folder, reports, faults))
    elif isinstance(source, str) and _PROJECT.fullmatch(source):
        runs = list(_online(source))
    else:
        raise FileNotFoundError(
            f"{str(source)!r} is neither a folder that holds W&B runs ({NAME}, at any depth) nor 'entity/project'"
        )
    for fault in faults:
        warnings.warn(fault, DamagedRun, stacklevel=2)
    return _table(runs)


def _offline(folder: Path, reports: bool, faults: list[str]) -> Iterator[_Run]:
    files = run_files(folder)
    if not files:
        raise FileNotFoundError(f"no W&B run in {folder}: there is no {NAME} in it, at any depth")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(read_run, files))
    at_home = _reports_of(files, found, faults) if reports else {}
    first: dict[str, Path] = {}
    for file, records in zip(files, found, strict=True):
        report = at_home.get(file)
        if records.fault is not None:
            kept = "what it holds is kept" if records.run_id else "the report stands for it" if report else "left out"
            faults.append(f"{file}: {records.fault}; {kept}")
        if records.run_id is None:
            if report is None:
                continue
            records = RunRecords(_named(file), started_at=report.get("started_at"))
        assert records.run_id is not None
        other = first.setdefault(records.run_id, file)
        if other != file and filecmp.cmp(file, other, shallow=False):
            faults.append(f"{file}: it is a copy of {other}; left out")
            continue
        if other != file:
            faults.append(f"{file}: it has the run id of {other}, and other content; both are kept")
        yield _Run(str(file.parent), records, report)


def _named(file: Path) -> str:
    """The run's id in its file's name."""
    return file.stem.removeprefix("run-")


def _reports_of(files: Sequence[Path], found: Sequence[RunRecords], faults: list[str]) -> dict[Path, dict[str, Any]]:
    """The reports that lie in the runs' folders, by the file of the run that each names."""
    homes: dict[Path, dict[str | None, Path]] = {}
    for file, records in zip(files, found, strict=True):
        # <home>/wandb/offline-run-<time>-<id>/run-<id>.wandb
        homes.setdefault(file.parent.parent.parent, {})[records.run_id or _named(file)] = file
    of = {}
    for home, runs in homes.items():
        for path in (home / name for name in _REPORTS if (home / name).exists()):
            try:
                report = json.loads(path.read_bytes())
                run_id = report["wandb"]["id"] if report["wandb"] else None
            except (OSError, ValueError, LookupError, TypeError) as error:
                faults.append(f"{path}: it is no report ({error}); left out")
                continue
            if run_id in runs:
                of[runs[run_id]] = report
            else:
                faults.append(f"{path}: it is of the W&B run {run_id}, which is not in its folder; left out")
    return of


def _online(project: str) -> Iterator[_Run]:
    import wandb

    try:
        for run in wandb.Api().runs(project, lazy=False):
            records = RunRecords(
                run_id=run.id,
                state=run.state,
                started_at=run.created_at,
                host=(run.metadata or {}).get("host"),
                config=own(run.config),
                summary=numbers(own(run.summary_metrics)),
                history=tuple(numbers(record) for record in run.scan_history()),
            )
            yield _Run(f"{project}/{run.id}", records)
    except wandb.errors.UsageError as error:
        raise ValueError(
            f"there is no folder {project!r}, and to read it as a W&B project takes an account: run `wandb login` "
            "or set WANDB_API_KEY"
        ) from error
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(f"there is no folder {project!r}, and W&B gives no project of that name: {error}") from error


def _table(runs: Iterable[_Run]) -> pd.DataFrame:
    runs = list(runs)
    about = pd.DataFrame([[run.records.run_id, run.path, run.records.state] for run in runs], columns=_ABOUT[:3])
    about["started_at"] = pd.to_datetime([run.records.started_at for run in runs], utc=True, format="ISO8601")
    about["host"] = [run.records.host for run in runs]
    logged = [
        _columns("config", [run.records.config for run in runs]),
        _columns("summary", [run.records.summary for run in runs]),
        _columns("report", [_scalars(run.report or {}) for run in runs]),
    ]
    whole = pd.DataFrame({"history": [_history(run.records.history) for run in runs]}, dtype=object)
    whole["report"] = pd.Series([run.report for run in runs], dtype=object)
    table = pd.concat([about, *logged, whole], axis=1)
    return table.sort_values("started_at", kind="stable", ignore_index=True)


def _columns(kind: str, each: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([dict(flat(values, f"{kind}.")) for values in each])


def _scalars(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(report) if not isinstance(value, list)}


def _history(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame([dict(flat(record)) for record in records])
    table = table.reindex(columns=[*_CLOCK, *(name for name in table if name not in _CLOCK)])
    table["_timestamp"] = pd.to_datetime(table["_timestamp"], unit="s", utc=True)
    return table
