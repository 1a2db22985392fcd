"""What a checkpoint says about itself, and which checkpoints of a folder are whole. Knows no torch.

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
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

FILE = "manifest.json"
FORMAT = "helix-checkpoint-1"
_NAME = re.compile(r"(\d{5,})-step-(\d+)")
_OWN_NAME = re.compile(r"[\w-]+\.safetensors")
_ITEMS = "__items__"  # a dict whose keys are not strings, as a list of pairs


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be loaded. One sentence."""


class CheckpointWarning(UserWarning):
    """A checkpoint that was passed over, by name, for the one before it."""


@dataclass(frozen=True)
class Chunk:
    """A box of a whole tensor, and the file that it lies in under `key`."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def key(self, name: str) -> str:
        return f"{name}@{','.join(map(str, self.offset))}"


@dataclass(frozen=True)
class Entry:
    """A whole tensor: its dtype by torch's name, its shape, and the chunks that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Sum:
    """What a file has to be."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class About:
    """What a checkpoint holds besides tensors; plain values, see `plain`.

    Args:
        step: optimizer steps behind it.
        extra: whoever saved it puts its own plain values here.
        optimizers: for each optimizer its type, and its groups' options and the names of their parameters.
    """

    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    tensors: dict[str, Entry]
    files: dict[str, Sum]
    about: About

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(each.nbytes for each in self.files.values())


def write(manifest: Manifest, folder: Path) -> None:
    """Write the manifest, on the disk when this returns."""
    body = {"format": FORMAT, **asdict(manifest)}
    with (folder / FILE).open("w") as file:
        json.dump({"sha256": _digest(body), **body}, file)
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
        body = json.loads((checkpoint / FILE).read_text())
        written = body.pop("sha256")
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"{checkpoint / FILE} is of format {body['format']!r}, and this Helix reads {FORMAT}"
            )
        if _digest(body) != written:
            raise ValueError("its checksum is another")
        return _parse(body)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def plain(value: Any, where: str) -> Any:
    """`value` as JSON can hold it; tuples become lists.

    Raises:
        CheckpointError: naming the place of what is no number, string, list or dict.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(each, f"{where}[{index}]") for index, each in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: plain(each, f"{where}.{key}") for key, each in value.items()}
        return {_ITEMS: [[plain(key, where), plain(each, f"{where}.{key}")] for key, each in value.items()]}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, and a checkpoint takes only numbers, strings, lists, dicts and None"
    )


def unplain(value: Any) -> Any:
    """What `plain` was given, but for tuples."""
    if isinstance(value, list):
        return [unplain(each) for each in value]
    if isinstance(value, dict):
        if set(value) == {_ITEMS}:
            return {key: unplain(each) for key, each in value[_ITEMS]}
        return {key: unplain(each) for key, each in value.items()}
    return value


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(body: dict[str, Any]) -> Manifest:
    # Its checksum may be a stranger's: whatever is not as a manifest's raises ValueError, KeyError or TypeError.
    files = {name: Sum(str(each["sha256"]), int(each["nbytes"])) for name, each in body["files"].items()}
    for name in files:
        if not _OWN_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a file in it")
    tensors = {}
    for name, each in body["tensors"].items():
        chunks = tuple(Chunk(c["file"], tuple(c["offset"]), tuple(c["shape"])) for c in each["chunks"])
        entry = Entry(each["dtype"], tuple(each["shape"]), chunks)
        if any(chunk.file not in files for chunk in chunks):
            raise ValueError(f"{name} lies in a file that is not listed")
        if sum(prod(chunk.shape) for chunk in chunks) != prod(entry.shape):
            raise ValueError(f"the pieces of {name} do not make it up")
        tensors[name] = entry
    return Manifest(tensors, files, About(**unplain(body["about"])))
