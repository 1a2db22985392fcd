"""A sweep's jobs: which can run, which were finished by an earlier start, and what their folders say of them.

The same command has the same folder (`folder_name`), and what became of a job is decided by the files in it, so
that a sweep that was killed goes on where it was, and so that a job needs nothing of the process that composed
it: under Hydra's joblib and Submitit launchers it runs in another one.

    report.json    (by the command's name for it) finished, if its `settings` is the digest of these
    skipped.json   it cannot run: "reason"
    failed.json    it ended with an error: "reason", "traceback"; tried again by the next start
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from helix.config.methods import to_name
from helix.config.schema import InferConfig, Settings, digest

REPORT, SKIPPED, FAILED = InferConfig.REPORT, "skipped.json", "failed.json"
_NAMED = ("parallel", "parallel.method", "parallel.m", "parallel.n", "parallel.stage", "parallel.schedule")


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Args:
        number: Hydra's, from 0.
        overrides: of the command's own keys, Hydra's left out.
        settings: what it measures.
        folder: where its files are, or would be.
        reason: why it cannot run here, in one sentence; None if it can.
    """

    number: int
    overrides: tuple[str, ...]
    settings: Settings
    folder: Path
    reason: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job: `status` is done, skipped, failed or open (not begun, or killed)."""

    status: str
    reason: str | None = None


def folder_name(overrides: Sequence[str]) -> str:
    """The name of a command's sweep folder: what it chose, the keys it sweeps, and a digest of all that it said.

    >>> folder_name(["parallel=helix", "parallel.m=1,2", "parallel.n=1,2", "model=dense", "hydra.verbose=true"])
    'helix_dense_m_n_96114388'

    The order counts, since it is the order of the jobs. Of Hydra's own keys only the sweeper's `params` do, which
    are overrides of the command by another way.
    """
    own = [text for text in overrides if not _is_hydras(text) or "hydra.sweeper.params" in text]
    chosen, swept = [], []
    for text in own:
        key, _, value = text.lstrip("+~").partition("=")
        if _is_sweep(text):
            swept.append(key.rpartition(".")[2])
        elif key in ("experiment", "parallel", "model", "workload"):
            chosen.append(value)
    readable = re.sub(r"[^\w.-]", "-", "_".join([*chosen, *swept]) or "sweep")[:60]
    return f"{readable}_{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]}"


def report_of(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """The report in a job's folder, if it can be read and is about these settings."""
    content = _read(folder / settings.REPORT)
    return content if content is not None and content.get("settings") == digest(settings) else None


def objective(folder: Path, settings: Settings) -> float:
    """The figure of a job's report by which a sweeper may choose the next; NaN without a report."""
    value: Any = report_of(folder, settings)
    for key in settings.OBJECTIVE:
        value = value.get(key) if isinstance(value, dict) else None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # there is none, or it is no number
        return float("nan")


def outcome(job: SweepJob) -> Outcome:
    """What became of a job, by its files."""
    if report_of(job.folder, job.settings) is not None:
        return Outcome("done")
    if job.reason is not None:
        return Outcome("skipped", job.reason)
    for status, name in (("skipped", SKIPPED), ("failed", FAILED)):
        if (content := _read(job.folder / name)) is not None:
            return Outcome(status, str(content.get("reason")))
    name = job.settings.REPORT
    return Outcome("open", f"{name} is not a report of this job" if (job.folder / name).exists() else None)


def keep(folder: Path, name: str, **content: str) -> None:
    """Write one of the small files of a job, whole or not at all."""
    draft = folder / f".{name}.{os.getpid()}"
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(folder / name)


def forget(folder: Path) -> None:
    """Remove what an earlier start said of a job that is now to run."""
    for name in (SKIPPED, FAILED):
        (folder / name).unlink(missing_ok=True)


def labels(jobs: Sequence[SweepJob]) -> list[str]:
    """A short name for each job: its method's, and what tells jobs of the same method apart, as `data=2`."""
    names = [to_name(job.settings.parallel) for job in jobs]
    if len(set(names)) == len(names):
        return names
    short = [[re.sub(r"^[^=]*[./]", "", override) for override in one] for one in others(jobs)]
    return [" ".join([name, *one]) for name, one in zip(names, short, strict=True)]


def others(jobs: Sequence[SweepJob]) -> list[tuple[str, ...]]:
    """Of each job's overrides those that differ between jobs and are no part of a method's name."""
    count = Counter(override for job in jobs for override in set(job.overrides))
    return [
        tuple(one for one in job.overrides if count[one] < len(jobs) and one.lstrip("+").split("=")[0] not in _NAMED)
        for job in jobs
    ]


def duration_s(folder: Path, settings: Settings) -> float | None:
    """How long a finished job took, from its report: the start that it notes, and the time of its writing."""
    report = report_of(folder, settings)
    try:
        began = datetime.fromisoformat(str((report or {})["started_at"])).timestamp()
        return max(0.0, (folder / settings.REPORT).stat().st_mtime - began)
    except (KeyError, ValueError, OSError):
        return None


class Progress:
    """What is said on stderr about a sweep's jobs, a line each.

    Args:
        jobs: all of them, or None if they are not known, since a sweeper chooses the next by the last.
        counts: whether this process sees every job end, so that it can tell how many have.
    """

    def __init__(self, jobs: Sequence[SweepJob] | None, counts: bool) -> None:
        self._names = labels(jobs) if jobs is not None else None
        self._counts = counts and jobs is not None
        before = {job.number: outcome(job).status for job in jobs or ()}
        self._left = sum(status in ("open", "failed") for status in before.values())
        self._ended = Counter(status for status in before.values() if status in ("done", "skipped"))
        spans = [duration_s(job.folder, job.settings) for job in jobs or () if before[job.number] == "done"]
        self._spans_s = [span for span in spans if span is not None]

    def name(self, number: int, settings: Settings) -> str:
        return self._names[number] if self._names is not None else to_name(settings.parallel)

    def begin(self, number: int, settings: Settings) -> None:
        """Say that a job begins."""
        counted = [
            f"{self._ended[status]} {status}" for status in ("skipped", "done", "failed") if self._ended[status]
        ]
        if self._spans_s and self._left:
            counted.append(f"about {_span(self._left * sum(self._spans_s) / len(self._spans_s))} left")
        self._say(number, settings, f"  ({', '.join(counted)})" if self._counts and counted else "")

    def end(self, status: str, span_s: float) -> None:
        """Note how a job ended, and how long it took."""
        self._ended[status] += 1
        self._left -= 1
        if status == "done":
            self._spans_s.append(span_s)

    def done_before(self, number: int, settings: Settings) -> None:
        """Say that an earlier start measured a job."""
        self._say(number, settings, " already measured")

    def skipped(self, number: int, settings: Settings, reason: str) -> None:
        """Say why a job cannot run."""
        self._say(number, settings, f" skipped: {reason}")

    def _say(self, number: int, settings: Settings, what: str) -> None:
        total = f" of {len(self._names)}" if self._names is not None else ""
        print(f"job {number + 1}{total}: {self.name(number, settings)}{what}", file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    """A length of time as one says it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def _is_hydras(override: str) -> bool:
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def _is_sweep(override: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except HydraException:  # refused with a sentence when the jobs are composed
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None for a file that is not there, or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
