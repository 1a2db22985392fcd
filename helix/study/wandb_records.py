"""What W&B's own reader finds in the file of a run on this disk, and which files there are.

`wandb leet inspect --json FILE` prints a file's records, one JSON object a line. As a Python command it spends a
second on imports; the program behind it takes 0.03 s, so that is called where W&B still keeps it there.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAME = "run-*.wandb"
_LIMIT_S = 120.0
# Exit codes above it are of a signal, 128 + its number.
_SIGNALLED = 128
_MISSING = float("nan")
# W&B's JSON has no such numbers, and writes their names.
_NOT_FINITE = {"NaN": _MISSING, "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True)
class RunRecords:
    """One run as its file has it.

    Attributes:
        run_id: W&B's; None if the file holds no run.
        state: "finished", "failed", "killed" (by a signal), or "unfinished": still going on, or cut short.
        started_at: ISO 8601.
        config, summary: as logged, without W&B's own entries.
        history: by dotted key what each logged record has, in order, NaN where it has none; with W&B's `_step`,
            `_runtime` (s) and `_timestamp` (s since 1970).
        fault: what the reader complained of; None of a sound file.
    """

    run_id: str | None = None
    state: str = "unfinished"
    started_at: str | None = None
    host: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, list[Any]] = field(default_factory=dict)
    fault: str | None = None


def run_files(folder: Path, closed: Callable[[OSError], None] | None = None) -> list[Path]:
    """The files of W&B runs at any depth, each once however many links lead to it, in the order of their paths.

    Args:
        folder: where to search.
        closed: is told of every folder and file that cannot be looked into.
    """
    found: dict[str, Path] = {}
    visited = set()
    for at, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        if (real := os.path.realpath(at)) in visited:
            folders.clear()  # a link back up, or W&B's own `latest-run`
            continue
        visited.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(at, name)), name))
        for name in sorted(fnmatch.filter(names, NAME)):
            file = Path(at, name)
            try:
                if stat.S_ISREG(file.stat().st_mode):
                    found.setdefault(os.path.realpath(file), file)
            except OSError as error:
                if closed is not None:
                    closed(error)
    return sorted(found.values())


def read_run(file: Path) -> RunRecords:
    """What a file holds, damaged or not; `fault` says what is wrong with it."""
    try:
        return _gather(*read_records(file))
    except RecursionError:
        return RunRecords(fault="its values are nested too deeply")


def read_records(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The records of a file in their order, as W&B's reader prints them, and what it complained of."""
    try:
        said = subprocess.run(
            [*_reader(), *_paths(file)],
            capture_output=True,
            encoding="utf-8",  # what it writes, whatever the locale is
            errors="replace",
            timeout=_LIMIT_S,
            # The public command would otherwise report its use over the network.
            env={**os.environ, "WANDB_MODE": "offline"},
        )
    except subprocess.TimeoutExpired:
        return [], f"W&B's reader needs more than {_LIMIT_S:g} s for it"
    records, fault = [], None
    for line in said.stdout.split("\n"):  # `splitlines` would also split at what a logged text may contain
        if line.startswith("{"):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                fault = f"a record of it cannot be read ({error})"
    return records, _complaint(said.stderr) or fault


@cache
def _reader() -> tuple[str, ...]:
    spec = find_spec("wandb")
    assert spec is not None, "wandb is a required package"
    assert spec.origin is not None
    program = Path(spec.origin).parent / "bin" / "wandb-core"  # as wandb.util.get_core_path has it
    if program.is_file():
        return str(program), "leet", "inspect", "--no-observability", "--json"
    return sys.executable, "-m", "wandb", "leet", "inspect", "--json"


def _paths(file: Path) -> tuple[str, ...]:
    if _reader()[0] == sys.executable:
        return (str(file),)
    return "--run-file", str(file), str(file.parent.parent)


def _complaint(errors: str) -> str | None:
    """The reader's last line, without its own name."""
    lines = errors.strip().splitlines()
    if not lines:
        return None
    return lines[-1].removeprefix("Error: ").removeprefix("wandb leet inspect: ").removeprefix("transactionlog: ")


def _gather(records: list[dict[str, Any]], fault: str | None) -> RunRecords:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["type"], []).append(record.get(record["type"], {}))
    if "run" not in by_kind:
        return RunRecords(fault=fault or "it holds no run, as of one that was killed before W&B wrote anything")
    head = by_kind["run"][-1]
    changes = [head.get("config", {}), *by_kind.get("config", [])]
    return RunRecords(
        run_id=head.get("run_id"),
        state=_state(by_kind.get("exit", [])),
        started_at=head.get("start_time"),
        host=head.get("host"),
        config=own(_together(changes)),
        summary=own(_together(by_kind.get("summary", []))),
        history=columns(record.get("item", {}) for record in by_kind.get("history", [])),
        fault=fault if fault or "exit" in by_kind else "it ends before the run does",
    )


def _state(exits: list[dict[str, Any]]) -> str:
    if not exits:
        return "unfinished"
    code = exits[-1].get("exit_code", 0)
    return "finished" if code == 0 else "killed" if code > _SIGNALLED else "failed"


def _together(changes: list[dict[str, Any]]) -> dict[str, Any]:
    """What is left after all updates and removals, in their order."""
    left: dict[str, Any] = {}
    for change in changes:
        _merge(left, change.get("update", {}))
        for each in change.get("remove", []):
            left.pop(each.get("key"), None)
    return {key: numbers(value) for key, value in left.items()}


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def own(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the run logged itself: W&B's own entries begin with an underscore."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


def numbers(value: Any) -> Any:
    """With numbers for their names at any depth, where JSON has none.

    W&B writes a logged text "NaN" just as it writes the number: it becomes the number, too. Of a NaN within a list or
    a mapping of a config, or a mapping of a summary, W&B writes null: it stays None.
    """
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [numbers(each) for each in value]
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items()}
    return value


def columns(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Logged records by their dotted keys, each with as many values as there are records: NaN where one has none.

    A list for each key, not a mapping for each record: runs may have 100,000 records.
    """
    table: dict[str, list[Any]] = {}
    count = 0
    for count, record in enumerate(records, start=1):
        for key, value in flat(record):
            column = table.setdefault(key, [])
            if len(column) < count:
                column.extend([_MISSING] * (count - len(column)))
            column[-1] = numbers(value)
    for column in table.values():
        column.extend([_MISSING] * (count - len(column)))
    return table


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings with its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
