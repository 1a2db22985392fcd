"""Running a sweep: what does not fit is passed over, what an earlier start finished is not repeated.

Hydra calls each job, finished ones included, since only so do its launchers work: they ask for nothing but a
function of a config, which decides by the files in the job's folder, in whatever process it runs. So
`hydra/launcher=joblib` and `hydra/launcher=slurm` need no more than their packages (`pip install
hydra-joblib-launcher`, the extra `slurm`).

An error ends its job and not the sweep, except among ranks that torchrun or srun started: some of those may be
left waiting for the others in a collective that nobody will complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import basic_launcher
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from helix.command.compose import Composed, found_jobs, job_folder, sweep_folder
from helix.command.job import Command, Stop, Task, check_agreed, hand_to_hydra, settle, stop, tell
from helix.command.sweep import (
    FAILED,
    SKIPPED,
    Progress,
    SweepJob,
    forget,
    keep,
    labels,
    objective,
    outcome,
    report_of,
)
from helix.config import environment
from helix.config.schema import Settings

_BASIC = f"{basic_launcher.__name__}.{basic_launcher.BasicLauncher.__name__}"


def run_sweep(this: Command, composed: Composed, sweep: DictConfig) -> None:
    """All jobs that can run and were not finished by an earlier start, then their table."""
    with _held(sweep_folder(sweep)) if environment.speaks() else nullcontext():
        _run_sweep(this, composed, sweep)


def _run_sweep(this: Command, composed: Composed, sweep: DictConfig) -> None:
    folder, basic = sweep_folder(sweep), sweep.hydra.launcher._target_ == _BASIC
    launcher = environment.started()
    if launcher is not None and (composed.jobs is None or not basic):
        stop(_cannot_follow(launcher.by, sweep), code=2)
    jobs = None if composed.jobs is None else _plan(this, composed.jobs, folder)
    if jobs is not None:
        check_agreed(this, [one.settings for one in jobs])
    found = None if jobs is None else _look(jobs)
    if launcher is not None and found is not None and this.agree is not None:
        found = this.agree(found)
    if not environment.speaks():
        for one in _to_run(jobs, found):
            this.task(one.settings, one.folder)
        return
    if jobs is None or _to_run(jobs, found):
        if basic and jobs is not None:  # what it says of each job, `Progress` does
            logging.getLogger(basic_launcher.__name__).setLevel(logging.WARNING)
        progress = Progress(jobs, counts=basic)
        try:
            hand_to_hydra(this, _sweep_job(this, progress, folder, jobs, found if launcher else None))
        except KeyboardInterrupt:
            stop("interrupted; the same command goes on from here", code=130)
    else:
        print(
            f"all jobs that can run are already measured in {folder}; to measure anew delete that folder or give "
            "another hydra.sweep.dir=",
            file=sys.stderr,
        )
    _end(this, folder, found_jobs(folder, this.schema) if jobs is None else jobs)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep a second start of the same command off this sweep's jobs, however this one ends."""
    lock = Path(tempfile.gettempdir()) / f"helix-sweep-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.lock"
    while True:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stop(
                    f"this sweep is running already, in {folder}; wait for it, or give another hydra.sweep.dir=",
                    code=2,
                )
            # One that ended in between took its file along: a lock on that keeps nobody off.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _cannot_follow(by: str, sweep: DictConfig) -> str:
    sweeper, launcher = (sweep.hydra.runtime.choices[f"hydra/{kind}"] for kind in ("sweeper", "launcher"))
    return (
        f"ranks that {by} started cannot follow hydra/sweeper={sweeper} with hydra/launcher={launcher}; take basic "
        "for both, or run without a launcher and the ranks are forked"
    )


def _plan(this: Command, jobs: list[DictConfig], folder: Path) -> list[SweepJob]:
    """The jobs of a sweep, those that cannot run with their reason."""
    plan = []
    for number, cfg in enumerate(jobs):
        overrides = tuple(cfg.hydra.overrides.task)
        where = f"job {number} ({' '.join(overrides)}): " if len(jobs) > 1 else ""
        one, misfit = settle(this, cfg, folder="hydra.sweep.dir", where=where)
        plan.append(SweepJob(number, overrides, _in_group(one, folder), job_folder(cfg), misfit))
    if all(job.reason is not None for job in plan):
        first = plan[0]
        which = f"none of {len(jobs)} jobs can run; job 0 ({' '.join(first.overrides)}): " if len(jobs) > 1 else ""
        stop(f"{which}{first.reason}", code=2)
    return plan


def _look(jobs: list[SweepJob]) -> list[str]:
    """What became of each job in earlier starts."""
    for one in jobs:
        if one.reason is None and environment.speaks():
            (one.folder / SKIPPED).unlink(missing_ok=True)  # this machine was in another state
    return [outcome(one).status for one in jobs]


def _to_run(jobs: list[SweepJob] | None, found: list[str] | None) -> list[SweepJob]:
    both = zip(jobs or (), found or (), strict=True)
    return [one for one, status in both if status in ("open", "failed")]


def _sweep_job(
    this: Command, progress: Progress, folder: Path, jobs: list[SweepJob] | None, found: list[str] | None
) -> Callable[[DictConfig], float]:
    """What Hydra calls for each job: returns the command's figure that a sweeper may look at, or NaN."""

    def job(cfg: DictConfig) -> float:
        own = HydraConfig.get()
        number, here = int(own.job.num), Path(own.runtime.output_dir)
        if jobs is not None and found is not None:  # all ranks have agreed
            one, misfit, done = jobs[number].settings, jobs[number].reason, found[number] == "done"
        else:
            one, misfit = settle(this, cfg)
            one = _in_group(one, folder)
            done = report_of(here, one) is not None
        if done:
            progress.done_before(number, one)
        elif misfit is not None:
            keep(here, SKIPPED, reason=misfit)
            progress.skipped(number, one, misfit)
        else:
            _attempt(this.task, progress, number, one, here)
        return objective(here, one)

    return job


def _attempt(task: Task, progress: Progress, number: int, one: Settings, folder: Path) -> None:
    """Run one job of a sweep; an error in it is kept in its folder."""
    forget(folder)
    progress.begin(number, one)
    tell(one)
    began, trace = time.monotonic(), ""
    try:
        task(one, folder)
    except Stop as ended:
        if ended.code != 1:
            raise
        reason = ended.reason
    except Exception as error:
        trace = traceback.format_exc()
        print(trace, file=sys.stderr)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        progress.end("done", time.monotonic() - began)
        return
    if not (folder / FAILED).exists():  # the task has not said it there itself
        keep(folder, FAILED, reason=reason, traceback=trace)
    progress.end("failed", time.monotonic() - began)
    if (launcher := environment.started()) is not None:
        stop(
            f"{progress.name(number, one)} failed, which ends the sweep: ranks that {launcher.by} started may be left "
            "waiting for each other; the same command goes on with this job",
            code=1,
        )


def _end(this: Command, folder: Path, jobs: Sequence[SweepJob]) -> None:
    if this.collect is not None:
        this.collect(folder, jobs)
    failed = [label for label, one in zip(labels(jobs), jobs, strict=True) if outcome(one).status == "failed"]
    if failed:
        stop(f"{len(failed)} of {len(jobs)} jobs failed ({', '.join(failed)}); the same command tries them again", 1)


def _in_group(one: Any, folder: Path) -> Any:
    """Jobs of a sweep are one W&B group, named after its folder unless another name was given."""
    return replace(one, logger=replace(one.logger, group=one.logger.group or folder.name))
