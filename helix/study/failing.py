"""How a job that fails ends: one sentence, an exit code, and in its folder what can be kept (`helix.study.left`).

Exit code 2 for what was asked for and cannot be, 1 for what went wrong meanwhile.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from helix.checkpoint.content import CheckpointError
from helix.command.job import stop
from helix.command.sweep import FAILED
from helix.config.schema import ConfigError, PartitionError
from helix.flight import ring
from helix.ranks.failure import RankError, exhausted, told
from helix.study.provenance import now
from helix.study.report import write_whole

_SAVE = "save"
# Kept free for failed.json, should the disk be full by then.
_ROOM, _ROOM_BYTES = ".room", 1 << 16


@contextmanager
def ending(run_dir: Path, *said: type[Exception]) -> Iterator[None]:
    """Around a job: whatever ends it on its way is said in one sentence, and kept in its folder.

    Args:
        said: errors that are sentences already, of something that went wrong.

    Raises:
        Stop: for all that came from a rank, a disk or a network. What else is raised here is a fault of the program.
    """
    forget(run_dir)
    with suppress(OSError):
        (run_dir / _ROOM).write_bytes(bytes(_ROOM_BYTES))
    # On a full disk each line that W&B or Hydra adds to a log would become a traceback on stderr.
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        with told(partial(_keep, run_dir)):
            yield
    except Exception as error:
        lost = error if isinstance(error, RankError) else error.__cause__
        lost = lost if isinstance(lost, RankError) else None
        # Of a checkpoint, a model's folder or a text that is not what it should be, or has gone since the first look.
        wrong = isinstance(error, ConfigError | CheckpointError | PartitionError)
        if wrong and (lost is None or lost.phase != _SAVE):
            stop(str(error), code=2)
        if isinstance(error, said):
            _keep(run_dir, error)
            stop(str(error), code=1)
        if lost is None and not isinstance(error, OSError):
            raise
        failure = lost or error
        kept = _keep(run_dir, failure)
        # What disks, files and memory lack is said in full; what a program has wrong is found by a traceback.
        if lost is None or not lost.trace or isinstance(error, OSError | CheckpointError) or exhausted(error):
            stop(_words(failure), code=1)
        if not kept:
            print(lost.trace, file=sys.stderr)
        stop(f"{lost}; its traceback is {f'in {_home(run_dir) / FAILED}' if kept else 'above'}", code=1)
    finally:
        home = _home(run_dir)
        ring.keep_in(None)  # what fails in this process from now on is another job's
        logging.raiseExceptions = before
        with suppress(OSError):
            for folder in (run_dir, home):  # which has that of a first start of torchrun's
                (folder / _ROOM).unlink(missing_ok=True)


def forget(run_dir: Path) -> None:
    """Remove what an earlier start has left of how it failed, which is not to be taken for a later one's."""
    with suppress(OSError):
        (run_dir / FAILED).unlink(missing_ok=True)
        ring.remove(run_dir)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _home(run_dir: Path) -> Path:
    """The job's folder: on ranks of a launcher that they have agreed on, where it can be seen."""
    agreed = ring.kept_in()
    return agreed if agreed is not None and agreed.is_dir() else run_dir


def _keep(run_dir: Path, error: Exception) -> bool:
    """Write failed.json, if there is a folder and room in it."""
    content: dict[str, str | int] = {"reason": _words(error), "at": now()}
    if isinstance(error, RankError):
        content |= {"rank": error.rank, "host": error.host, "phase": error.phase, "traceback": error.trace}
    run_dir = _home(run_dir)
    if not run_dir.is_dir():
        return False
    try:
        (run_dir / _ROOM).unlink(missing_ok=True)
        write_whole(json.dumps(content, indent=2) + "\n", run_dir / FAILED)
    except OSError:
        return False
    return True
