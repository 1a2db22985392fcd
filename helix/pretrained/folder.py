"""What a Hugging Face model's folder holds: its configuration, and where each tensor lies. Knows no torch.

Only headers are read: of a folder of any size, some kilobytes. Weights are safetensors, or are not loaded: a pickle
(`pytorch_model.bin`) runs a stranger's code when it is opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from helix.checkpoint.content import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# For every from_pretrained: a folder's own code (`auto_map`) never runs, and nobody is asked whether it should, which
# transformers does at a terminal if it is told neither.
ONLY_DATA = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class Stored:
    """A tensor in one of the folder's files.

    Args:
        file: its name in the folder.
        dtype: as safetensors calls it, "F32".
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Folder:
    """A model's folder.

    Args:
        config: of config.json.
        tensors: by the names that they have in the files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]


def find(path: Path | str) -> Folder:
    """A model's folder, every file of it there, and none shorter than its header says.

    Raises:
        CheckpointError: naming what is missing, damaged or not safetensors.
    """
    path = Path(path)
    config = read_config(path)
    return Folder(path, config, _single(path) if (path / WEIGHTS).is_file() else _sharded(path))


def read_config(path: Path | str) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: if there is none, or it is not an object of JSON.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        raise CheckpointError(f"{path} is one file; make a folder of it, once: python -m helix gguf {path} FOLDER")
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; give one with config.json and safetensors files")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give the folder of one Hugging Face model")
    return _json(path / "config.json")


def _single(path: Path) -> dict[str, Stored]:
    return _header(path / WEIGHTS)


def _sharded(path: Path) -> dict[str, Stored]:
    if not (path / INDEX).is_file():
        raise CheckpointError(_without_weights(path))
    places = _json(path / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path / INDEX} has no weight_map, which says what file each tensor is in")
    tensors: dict[str, Stored] = {}
    for name in sorted({str(file) for file in places.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{path / INDEX} names {name}, which is not a file of its own folder")
        if not _is_file(path / name):
            raise CheckpointError(f"{path} lacks {name[:80]}, of which {INDEX} tells")
        found = _header(path / name)
        for tensor in (tensor for tensor, file in places.items() if file == name):
            if tensor not in found:
                raise CheckpointError(f"{path / name} lacks {tensor}, of which {INDEX} tells")
            tensors[tensor] = found[tensor]
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name of a thousand letters
        return False


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  no dict
            return {
                name: Stored(file.name, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from None


def _without_weights(path: Path) -> str:
    names = sorted(each.name for each in path.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f"{path} has pickled weights ({pickled[0]}), which can run a stranger's code and are not loaded; save the "
            "model once more as safetensors, with save_pretrained of a transformers that you trust it to"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{path} has no safetensors; make a folder of its GGUF: python -m helix gguf {path / gguf[0]} FOLDER"
    return f"{path} has no weights: neither {WEIGHTS} nor {INDEX}"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not an object of JSON")
    return value
