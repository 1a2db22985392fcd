"""A checkpoint's manifest on the disk, and which checkpoints of a folder are whole. Knows no torch.

    folder/
      00007-step-350/             a checkpoint: the 7th of this folder, after 350 optimizer steps
        rank-00000.safetensors    what rank 0 wrote
        ..
        manifest.json             every tensor's pieces, every file's sha256, and its own; written last
      .00008-step-400.partial/    one that is being written, or was when its ranks were killed

A checkpoint is written under the second name and renamed when it is whole and on the disk, so that a name of the
first form is never half a checkpoint. Its number, not its step, says which is newest: whoever goes back to step 300
and trains from there means the new branch.

Nothing in it is pickled. `torch.distributed.checkpoint`'s own storage keeps the tensors' places in a pickle, which
runs a stranger's code when it is read; here they are JSON, and the tensors are safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helix.checkpoint.content import CheckpointError, Manifest, parse

FILE = "manifest.json"
FORMAT = "helix-checkpoint-2"
_NAME = re.compile(r"(\d{5,})-step-(\d+)")


class CheckpointWarning(UserWarning):
    """A checkpoint that was passed over, by name, for the one before it."""


def write(manifest: Manifest, folder: Path) -> None:
    """Write the manifest, on the disk when this returns."""
    with (folder / FILE).open("w") as file:
        file.write(seal({"format": FORMAT, **manifest.plain()}))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def read(checkpoint: Path) -> Manifest:
    """The manifest, once its own checksum is right.

    Raises:
        CheckpointError: if there is none, or it is not as it was written.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no checkpoint: there is no such folder")
    if not (checkpoint / FILE).is_file():
        raise CheckpointError(f"{checkpoint} is not a whole checkpoint: it has no {FILE}, which is written last")
    try:
        text = (checkpoint / FILE).read_text()
        body = json.loads(text)
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"{checkpoint / FILE} is of format {body['format']!r}, and this Helix reads {FORMAT}"
            )
        if text != _sealed(text.partition(",")[2]):
            raise ValueError("its checksum is another")
        return parse(body)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint / FILE} is not what was written ({error}), so this checkpoint is not loaded"
        ) from None


def verify(checkpoint: Path | str) -> Manifest:
    """Check every file of a checkpoint against its checksum.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered.
    """
    checkpoint = Path(checkpoint)
    manifest = read(checkpoint)
    check_files(checkpoint, manifest, manifest.files)
    return manifest


def check_files(checkpoint: Path, manifest: Manifest, files: Iterable[str]) -> None:
    """Check some of a checkpoint's files; see `verify`."""
    for name in files:
        path, expected = checkpoint / name, manifest.files[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, so this checkpoint is not loaded")
        if (nbytes := path.stat().st_size) != expected.nbytes:
            raise CheckpointError(
                f"{path} has {nbytes} bytes and was written with {expected.nbytes}, so this checkpoint is not loaded"
            )
        if sha256(path) != expected.sha256:
            raise CheckpointError(f"{path} was altered (its sha256 is another), so this checkpoint is not loaded")


def checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoints of a folder by name, the oldest first; none of them verified."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(folder: Path | str) -> Path | None:
    """The newest checkpoint whose every file is as it was written; None if the folder has no checkpoints.

    Warns (CheckpointWarning) of each newer one that is not.

    Raises:
        CheckpointError: if there are checkpoints, and none is whole.
    """
    refused = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        warn_refused(refused, path)
        return path
    if refused:
        raise CheckpointError(none_whole(folder, refused))
    return None


def warn_refused(refused: Iterable[str], taken: Path) -> None:
    for reason in refused:
        warnings.warn(f"{reason}; {taken.name} is taken instead", CheckpointWarning, stacklevel=3)


def none_whole(folder: Path | str, refused: list[str]) -> str:
    return f"none of the {len(refused)} checkpoints in {folder} is whole; the newest: {refused[0]}"


def next_path(folder: Path, step: int) -> Path:
    """The path of this folder's next checkpoint. Leftovers of saves that were cut short are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (".*-step-*.partial", ".*-step-*.old"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    numbers = [int(match[1]) for path in checkpoints(folder) if (match := _NAME.fullmatch(path.name))]
    return folder / f"{max(numbers, default=0) + 1:05d}-step-{step}"


def draft(checkpoint: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def publish(checkpoint: Path, keep: int | None) -> None:
    """Give a whole draft its name, and remove all but the last `keep` checkpoints beside it."""
    draft(checkpoint).rename(checkpoint)
    sync(checkpoint.parent)
    if keep is None:
        return
    for old in checkpoints(checkpoint.parent)[:-keep]:
        # Renamed first: a checkpoint that is half removed must not look like one.
        gone = old.with_name(f".{old.name}.old")
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or to a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(body: dict[str, Any]) -> str:
    """A manifest's text: JSON whose first member is the checksum of all that follows it."""
    return _sealed(json.dumps(body, separators=(",", ":"))[1:])


def _sealed(rest: str) -> str:
    return f'{{"sha256":"{hashlib.sha256(rest.encode()).hexdigest()}",{rest}'
