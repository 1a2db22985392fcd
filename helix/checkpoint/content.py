"""What a checkpoint's manifest says, as dataclasses, and what of a stranger's is refused. Knows no torch."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

# Bytes of one element, by torch's name of its type: the types that a checkpoint holds.
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_OWN_NAME = re.compile(r"[\w-]+\.safetensors")
_ITEMS = "__items__"  # a dict whose keys are not strings, as a list of pairs
_MOST_DIMS = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be loaded. One sentence."""


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
        models: by name in what was saved, the transformers that it holds; see `helix.checkpoint.trained`.
    """

    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    tensors: dict[str, Entry]
    files: dict[str, Sum]
    about: About

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(each.nbytes for each in self.files.values())

    def plain(self) -> dict[str, Any]:
        """As JSON has it; `parse` undoes it. Not `asdict`, which copies each number: 20 times as long."""
        tensors = {}
        for name, entry in self.tensors.items():
            chunks = [[chunk.file, chunk.offset, chunk.shape] for chunk in entry.chunks]
            tensors[name] = {"dtype": entry.dtype, "shape": entry.shape, "chunks": chunks}
        files = {name: {"sha256": each.sha256, "nbytes": each.nbytes} for name, each in self.files.items()}
        return {"tensors": tensors, "files": files, "about": vars(self.about)}


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


def parse(body: dict[str, Any]) -> Manifest:
    """A manifest whose every figure may be a stranger's, who has sealed it with a checksum that is right.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it is no manifest's, or what it describes cannot be.
    """
    files = {name: Sum(each["sha256"], _size(each["nbytes"])) for name, each in body["files"].items()}
    for name in files:
        if not _OWN_NAME.fullmatch(name):  # so that no path leads out of the folder
            raise ValueError(f"{name!r} is no name of a file in it")
    tensors = {name: _entry(name, each, files) for name, each in body["tensors"].items()}
    held = Counter[str]()
    for entry in tensors.values():
        for chunk in entry.chunks:
            held[chunk.file] += prod(chunk.shape) * DTYPE_BYTES[entry.dtype]
    for name, nbytes in held.items():
        if nbytes > files[name].nbytes:  # so that nobody makes room for what is not there
            raise ValueError(f"{name} has {files[name].nbytes} bytes, and the tensors in it have {nbytes}")
    about = About(**unplain(body["about"]))
    _size(about.step)
    for each in about.optimizers:
        if not isinstance(each["type"], str) or any(group.keys() != {"options", "params"} for group in each["groups"]):
            raise ValueError("it tells of an optimizer that is none")
    return Manifest(tensors, files, about)


def _entry(name: str, each: dict[str, Any], files: dict[str, Sum]) -> Entry:
    if each["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{name} is of dtype {each['dtype']!r}, and a checkpoint holds: {', '.join(DTYPE_BYTES)}")
    chunks = tuple(Chunk(file, _sizes(offset), _sizes(shape)) for file, offset, shape in each["chunks"])
    entry = Entry(each["dtype"], _sizes(each["shape"]), chunks)
    if any(chunk.file not in files for chunk in chunks):
        raise ValueError(f"{name} lies in a file that is not listed")
    if not _tile(entry):
        raise ValueError(f"the pieces of {name} do not make it up")
    return entry


def _tile(entry: Entry) -> bool:
    """Whether the chunks cover the whole, each part of it once.

    A box's indicator function is known by its corners, the origin's positive and with a change of sign for every
    edge on the way to another. So the boxes' sum is the whole's exactly if all signs cancel: neither a piece that
    overlaps another, nor a gap, nor a piece that sticks out leaves none. This takes a time in proportion to the
    chunks, which comparing each with each would not.
    """
    signs = Counter[tuple[int, ...]]()
    whole = Chunk("", (0,) * len(entry.shape), entry.shape)
    for box, sign in [(whole, -1), *((chunk, 1) for chunk in entry.chunks)]:
        if len(box.offset) != len(entry.shape) or len(box.shape) != len(entry.shape):
            return False
        edges = [((o, 1), (o + n, -1)) for o, n in zip(box.offset, box.shape, strict=True)]
        for corner in product(*edges) if prod(box.shape) else ():
            signs[tuple(place for place, _ in corner)] += sign * prod(each for _, each in corner)
    return not any(signs.values())


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MOST_DIMS:
        raise ValueError(f"a shape or an offset is a list of at most {_MOST_DIMS} numbers, not {values!r}")
    return tuple(map(_size, values))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:  # a petabyte's bytes have 50 bits
        raise ValueError(f"{value!r} is no size")
    return value
