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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from helix.config.schema import InferConfig
from helix.config.train_schema import TrainConfig
from helix.study.left import Left, left_in
from helix.study.wandb_records import NAME, RunRecords, columns, flat, numbers, own, read_run, run_files

_ABOUT = ["run_id", "path", "state", "started_at", "host"]
_CLOCK = ["_step", "_runtime", "_timestamp"]
_REPORTS = (InferConfig.REPORT, TrainConfig.REPORT)
_PROJECT = re.compile(r"[\w.-]+/[\w.-]+")
_REACHED_S = 4


class DamagedRun(UserWarning):
    """A file of a run, or its report, that could not be read in whole; the message names it and its fault."""


@dataclass(frozen=True)
class _Report:
    path: Path | None = None
    whole: dict[str, Any] | None = None
    scalars: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    path: str
    records: RunRecords
    report: _Report
    failed: Mapping[str, Any] = field(default_factory=dict)


def load_runs(source: str | Path, *, reports: bool = True) -> pd.DataFrame:
    """One row for each W&B run, in the order in which they started.

    Columns: `run_id`; `path`, the run's W&B folder, or "entity/project/id"; `state`: "finished", "failed", "killed",
    "unfinished" (still going on, or cut short), online also W&B's "running" and "crashed"; `started_at` in UTC;
    `host`; the dotted `config.<key>` and `summary.<key>` as logged, and `report.<key>`, the scalars of the report
    beside the W&B folder; of a job that failed `failed.<key>` of the `failed.json` there, such as its reason;
    `history`, a DataFrame with a row for each logged record and W&B's `_step`, `_runtime` (s) and `_timestamp` (UTC)
    first; `report`, the whole report as a dict, or None. What a run does not have is missing (NaN). Runs without W&B
    (`logger=none`) are not among them.

    Every damaged file is named in a `DamagedRun` warning. What it still holds is kept; where that is nothing, the row
    is the report's, if one names the run, else there is none. So is every folder that cannot be read, and every
    config, summary or report of which two values have one dotted key: the later one is the column's. Of copies of a
    run, one with a report is kept; of two reports that name one run, `report.json`.

    W&B's file does not tell a logged text "NaN", "Infinity" or "-Infinity" from the number: it is a number here.

    Args:
        source: a folder, searched at any depth, or a W&B project, "entity/project", if there is no such folder.
        reports: whether to read the reports. Online runs have none.

    Raises:
        FileNotFoundError: if there is no such folder, or no run in it; "" is none: the current folder is ".".
        ValueError: if W&B has no such project, cannot be reached, or no account is set up.
    """
    folder = Path(source)
    faults: list[str] = []
    if str(source) and folder.is_dir():  # Path("") is "."
        runs = list(_offline(folder, reports, faults))
    elif isinstance(source, str) and _PROJECT.fullmatch(source):
        runs = list(_online(source, faults))
    else:
        raise FileNotFoundError(
            f"{str(source)!r} is neither a folder that holds W&B runs ({NAME}, at any depth) nor 'entity/project'"
        )
    for fault in faults:
        warnings.warn(fault, DamagedRun, stacklevel=2)
    return _table(runs)


def _offline(folder: Path, reports: bool, faults: list[str]) -> Iterator[_Run]:
    files = run_files(folder, lambda error: faults.append(f"{error.filename}: {error.strerror}; left out"))
    if not files:
        closed = "".join(f"; {fault}" for fault in faults)
        raise FileNotFoundError(f"no W&B run in {folder}: there is no {NAME} in it, at any depth{closed}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(read_run, files))
    at_home = _reports_of(files, found, faults) if reports else {}
    gone = _left_of(files, faults)
    kept: dict[str, list[Path]] = {}
    # Those with a report first: of copies, the first is kept.
    for file, records in sorted(zip(files, found, strict=True), key=lambda pair: pair[0] not in at_home):
        report, left = at_home.get(file, _Report()), gone.get(file, Left())
        if records.fault is not None:
            rest = (
                "what it holds is kept"
                if records.run_id
                else "the report stands for it"
                if report.path
                else "what its job has left stands for it"
                if left.failed
                else "left out"
            )
            faults.append(f"{file}: {records.fault}; {rest}")
        if not records.run_id:
            if report.whole is None and not left.failed:
                continue
            records = RunRecords(_named(file), started_at=(report.whole or {}).get("started_at"))
        assert records.run_id is not None
        others = kept.setdefault(records.run_id, [])
        if copied := [other for other in others if _same(file, other)]:
            faults.append(f"{file}: it is a copy of {copied[0]}; left out")
            continue
        if others:
            faults.append(f"{file}: it has the run id of {others[0]}, and other content; both are kept")
        others.append(file)
        if left.failed:
            records = replace(records, state="failed", history=records.history or left.history)
        yield replace(_run(str(file.parent), records, faults, report), failed=left.failed)


def _left_of(files: Sequence[Path], faults: list[str]) -> dict[Path, Left]:
    """What failed jobs have left in runs' folders, by the file of the last run of each.

    Also of one whose run was finished: another rank may have failed after that.
    """
    last = {_home(file): file for file in files}  # their folders' names begin with the time
    return {file: left_in(home, faults) for home, file in last.items()}


def _home(file: Path) -> Path:
    """The folder of a job: <home>/wandb/offline-run-<time>-<id>/run-<id>.wandb."""
    return file.parent.parent.parent


def _same(file: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(file, other, shallow=False)
    except OSError:  # a file that cannot be read, for which its report stands
        return False


def _run(path: str, records: RunRecords, faults: list[str], report: _Report = _Report()) -> _Run:
    config = _leaves(records.config, f"{path}: its config", faults)
    summary = _leaves(records.summary, f"{path}: its summary", faults)
    return _Run(path, replace(records, config=config, summary=summary), report)


def _leaves(values: Mapping[str, Any], whose: str, faults: list[str]) -> dict[str, Any]:
    """By dotted key; two values may have the same, as in {"a": {"b": 1}, "a.b": 2}."""
    leaves: dict[str, Any] = {}
    for key, value in flat(values):
        if key in leaves:
            faults.append(f"{whose} has two values for {key!r}; the later one is kept")
        leaves[key] = value
    return leaves


def _named(file: Path) -> str:
    """The run's id in its file's name."""
    return file.stem.removeprefix("run-")


def _reports_of(files: Sequence[Path], found: Sequence[RunRecords], faults: list[str]) -> dict[Path, _Report]:
    """The reports that lie in the runs' folders, by the file of the run that each names."""
    homes: dict[Path, dict[str | None, Path]] = {}
    for file, records in zip(files, found, strict=True):
        homes.setdefault(_home(file), {})[records.run_id or _named(file)] = file
    of: dict[Path, _Report] = {}
    for home, runs in homes.items():
        for path in (home / name for name in _REPORTS):
            try:
                run_id, report = _read_report(path, faults)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                faults.append(f"{path}: it is no report ({error}); left out")
                continue
            if run_id not in runs:
                faults.append(f"{path}: it is of the W&B run {run_id}, which is not in its folder; left out")
            elif (other := of.setdefault(runs[run_id], report)) is not report:
                faults.append(f"{path}: it is of the W&B run {run_id}, as is {other.path}; left out")
    return of


def _read_report(path: Path, faults: list[str]) -> tuple[str | None, _Report]:
    """The W&B run that a report names, and the report."""
    whole = json.loads(path.read_bytes())
    run_id = whole["wandb"]["id"] if whole["wandb"] is not None else None
    started_at = whole.get("started_at")
    for name, value in (("W&B id", run_id), ("started_at", started_at)):
        if not isinstance(value, str | None):
            raise TypeError(f"its {name} is no text but {type(value).__name__}")
    if started_at is not None and pd.isna(pd.to_datetime(started_at, utc=True, format="ISO8601", errors="coerce")):
        raise ValueError(f"its started_at, {started_at!r}, is no ISO 8601 time")
    leaves = _leaves(whole, f"{path}: it", faults)
    return run_id, _Report(path, whole, {key: value for key, value in leaves.items() if not isinstance(value, list)})


def _online(project: str, faults: list[str]) -> Iterator[_Run]:
    import wandb

    try:
        # It asks the server whose the account is; without a network it would wait for 20 s. Reading may take longer.
        wandb.Api(timeout=_REACHED_S)
        for run in wandb.Api().runs(project, lazy=False):
            records = RunRecords(
                run_id=run.id,
                state=run.state,
                started_at=run.created_at,
                host=(run.metadata or {}).get("host"),
                config=numbers(own(run.config)),
                summary=numbers(own(run.summary_metrics)),
                history=columns(run.scan_history()),
            )
            yield _run(f"{project}/{run.id}", records, faults)
    except wandb.errors.UsageError as error:
        raise ValueError(
            f"there is no folder {project!r}, and to read it as a W&B project takes an account: run `wandb login` "
            "or set WANDB_API_KEY"
        ) from error
    except wandb.errors.AuthenticationError as error:
        # W&B says that "the service process is busy" if nothing was answered.
        answered = getattr(error.__cause__, "response", None) is not None
        fault = f"does not take the account ({error})" if answered else f"cannot be reached within {_REACHED_S} s"
        server = os.environ.get("WANDB_BASE_URL", "W&B's server")
        raise ValueError(
            f"there is no folder {project!r}, and as a W&B project it is not read: {server} {fault}"
        ) from error
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(f"there is no folder {project!r}, and W&B gives no project of that name: {error}") from error


def _table(runs: Iterable[_Run]) -> pd.DataFrame:
    runs = list(runs)
    about = pd.DataFrame([[run.records.run_id, run.path, run.records.state] for run in runs], columns=_ABOUT[:3])
    about["started_at"] = pd.to_datetime(
        [run.records.started_at for run in runs], utc=True, format="ISO8601", errors="coerce"
    )
    about["host"] = [run.records.host for run in runs]
    logged = [
        _columns("config", [run.records.config for run in runs]),
        _columns("summary", [run.records.summary for run in runs]),
        _columns("report", [run.report.scalars for run in runs]),
        _columns("failed", [run.failed for run in runs]),
    ]
    whole = pd.DataFrame({"history": [_history(run.records.history) for run in runs]}, dtype=object)
    whole["report"] = pd.Series([run.report.whole for run in runs], dtype=object)
    table = pd.concat([about, *logged, whole], axis=1)
    return table.sort_values("started_at", kind="stable", ignore_index=True)


def _columns(kind: str, each: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([{f"{kind}.{key}": value for key, value in leaves.items()} for leaves in each])


def _history(logged: Mapping[str, list[Any]]) -> pd.DataFrame:
    table = pd.DataFrame(logged)
    table = table.reindex(columns=[*_CLOCK, *(name for name in table if name not in _CLOCK)])
    table["_timestamp"] = pd.to_datetime(table["_timestamp"], unit="s", utc=True, errors="coerce")
    return table
