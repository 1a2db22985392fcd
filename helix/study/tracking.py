"""The W&B run of rank 0, finished on every way out.

A run's records reach its file only once they are flushed: in a forked rank that ends without `finish()`, the
file keeps 7 bytes, silently. A rank ends in five ways:

    returns, raises     the context manager finishes the run (exit code 0, or the error's)
    SIGTERM, SIGINT     torch elastic sends it to the survivors when a rank dies: a thread that is told of it
                        (`helix.ranks.signals`) finishes the run and ends the process, with 128 + signal.
    lost rank           where ranks watch each other (`helix.ranks.heartbeat`), the one that says so finishes the run.
    SIGKILL             nobody can finish it; see `track`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helix.config.schema import ConfigError
from helix.flight import activity
from helix.ranks.failure import stop, told
from helix.ranks.signals import signals
from helix.study.left import HISTORY
from helix.study.report import Tracked

if TYPE_CHECKING:
    from wandb import Run

    from helix.config.schema import LoggerConfig

# torch elastic follows with SIGKILL after 30 s, a user sooner; an offline run needs less than 1 s to finish.
_FINISH_LIMIT_S = 5.0
_REACHED_LIMIT_S = 10.0  # W&B itself would wait for its server for 90 s
# After Ctrl-C, how long the main thread gets to unwind by itself, so that its traceback and clean-up happen.
_UNWIND_LIMIT_S = 1.0


class Tracker:
    """Where a run's metrics go: a W&B run, or nowhere; and a file of lines until the run's report holds them.

    Args:
        history: that file's path; None for none.

    Attributes:
        experiment: the W&B run, as Lightning's `WandbLogger(experiment=...)` takes it; None with `kind: none`.
        mode: "offline" or "online"; None with `kind: none`.
        id: W&B's id of the run.
        path: the run's folder (which holds `run-{id}.wandb`).
    """

    def __init__(self, experiment: Run | None, mode: str | None, history: Path | None = None) -> None:
        self.experiment = experiment
        self._history = history
        self.mode = mode
        self.id: str | None = experiment.id if experiment else None
        self.path: Path | None = Path(experiment.dir).parent if experiment else None
        self._finishing = threading.Lock()
        self.finished = threading.Event()

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add one record to the run's history. Steps must not decrease: W&B drops records of earlier steps."""
        if self._history is not None:
            # Opened anew for each: what is written is then with the kernel, whatever becomes of this process.
            with suppress(OSError), self._history.open("a") as file:
                file.write(json.dumps({"_step": step, "_timestamp": time.time()} | dict(metrics)) + "\n")
        if self.experiment is not None:
            with self._or_without():
                self.experiment.log(dict(metrics), step=step)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Set the run's final figures."""
        if self.experiment is not None:
            with self._or_without():
                self.experiment.summary.update(dict(figures))

    def finish(self, exit_code: int) -> None:
        """Flush and close the run; only the first call counts, and the others wait for it."""
        with self._finishing:
            if self.experiment is not None and not self.finished.is_set():
                with self._or_without():
                    self.experiment.finish(exit_code=exit_code)
            self.finished.set()

    def fail(self, exit_code: int) -> None:
        """Finish the run as failed within a bounded time, as W&B's own process may be gone too."""
        finishing = threading.Thread(target=self.finish, args=(exit_code,), daemon=True)
        finishing.start()
        finishing.join(_FINISH_LIMIT_S)

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """Go on without W&B if its own process has ended: what is measured does not depend on it."""
        try:
            yield
        except Exception as error:  # a broken pipe, or W&B's own word for it
            self.experiment = None
            words = " ".join(str(error).split())
            print(f"the W&B run {self.id} has lost W&B's process ({words}); it goes on without", file=sys.stderr)


@contextmanager
def track(
    config: LoggerConfig, directory: Path | str, run_config: Mapping[str, Any], restarted: bool = False
) -> Iterator[Tracker]:
    """Own the W&B run of this process, which must be rank 0's, from its main thread.

    A process killed with SIGKILL loses what W&B had not written: offline it writes whole blocks of 32 KB and
    has no flush but `finish`, so a short run's file then holds nothing (seen with W&B 0.31). Two files beside it are
    the record of what was killed: `history.jsonl`, which has what was logged and is removed once the run has ended
    well, and the launcher's `failed.json`. W&B's own process ends by itself a second later.

    Args:
        config: `kind: none` gives a tracker without a W&B run.
        directory: an existing folder, under which `wandb/` is made.
        run_config: the composed config as a plain dict.
        restarted: whether the ranks were started again in this folder, so that its `history.jsonl` goes on.

    Raises:
        ConfigError: if `mode: online` finds no account, or no server.
    """
    history = Path(directory) / HISTORY
    if not restarted:
        history.unlink(missing_ok=True)
    if config.kind == "none":
        yield Tracker(None, None, history)
    else:
        with _temporary_files_of_the_rank():
            run = _start(config, directory, run_config)
        tracker = Tracker(run, config.mode, history)
        with signals(partial(_on_signal, tracker)), told(lambda _: tracker.fail(1)):
            try:
                yield tracker
            except BaseException as error:
                tracker.fail(_exit_code(error))
                raise
            tracker.finish(0)
    history.unlink(missing_ok=True)


def _start(config: LoggerConfig, directory: Path | str, run_config: Mapping[str, Any]) -> Run:
    import wandb  # 0.5 s, and not at all with `kind: none`

    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        # The remote's address may hold a token, and a command line what its user typed; commit and settings are kept.
        disable_git=True,
        x_disable_meta=True,
        # A sampling thread would share two cores with sixteen ranks whose time is being measured.
        x_disable_stats=True,
        init_timeout=_REACHED_LIMIT_S,
    )
    try:
        return wandb.init(
            project=config.project,
            group=config.group,
            dir=str(directory),
            mode="online" if config.mode == "online" else "offline",
            config=dict(run_config),
            settings=settings,
        )
    except wandb.errors.UsageError as error:
        raise ConfigError(
            "logger.mode=online needs a W&B account: run `wandb login`, set WANDB_API_KEY, or use logger.mode=offline"
        ) from error
    except wandb.errors.Error as error:
        server = os.environ.get("WANDB_BASE_URL", "W&B's server")
        raise ConfigError(
            f"logger.mode={config.mode}: {server} was not reached within {_REACHED_LIMIT_S:.0f} s "
            f"({' '.join(str(error).split())}); use logger.mode=offline or logger=none"
        ) from error


@contextmanager
def _temporary_files_of_the_rank() -> Iterator[None]:
    """W&B's import and start make temporary folders, which a killed rank leaves; its launcher's folder takes them."""
    before = tempfile.tempdir
    tempfile.tempdir = activity.folder() or before
    try:
        yield
    finally:
        tempfile.tempdir = before


def _on_signal(tracker: Tracker, number: int) -> None:
    if number == signal.SIGINT and tracker.finished.wait(_UNWIND_LIMIT_S):
        return  # the main thread was in Python, and KeyboardInterrupt reached it
    _end(tracker, 128 + number)


def _end(tracker: Tracker, exit_code: int) -> None:
    """Finish the run and end the process, within a bounded time. Nothing else of the rank's state is at stake."""
    stop()
    tracker.fail(exit_code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(exit_code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def tracked_at(tracker: Tracker, run_dir: Path) -> Tracked | None:
    """What a report in `run_dir` says of the run; None with `kind: none`."""
    if tracker.path is None or tracker.mode is None:
        return None
    return Tracked(tracker.mode, str(tracker.path.relative_to(run_dir.resolve())), tracker.id)
