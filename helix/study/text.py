"""Tokens: the bytes of a real text that every machine has.

The default text is the running Python's own standard library: the top-level `.py` files of its `stdlib`
folder, in the order of their names. It is English prose (docstrings, comments) and code, about 5 MB, needs no
download, and is the same on every machine with the same Python version. A byte is a token; the vocabulary is 256.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt

LIMIT_BYTES = 4 << 20


def corpus(path: str | None = None, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """The first `limit_bytes` bytes of a text.

    Args:
        path: a file, or a folder whose files are read in the order of their paths, at any depth; null for the
            standard library's sources.
        limit_bytes: how much to read at most.

    Raises:
        ValueError: if there is nothing at `path`, or nothing in it.
    """
    if path is None:
        files = sorted(_standard_library().glob("*.py"))
    elif Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    elif Path(path).is_file():
        files = [Path(path)]
    else:
        raise ValueError(f"there is no text at {path}; give a file or a folder, or null for {describe(None)}")
    text = bytearray()
    for file in files:
        with file.open("rb") as source:
            text += source.read(limit_bytes - len(text))
        if len(text) >= limit_bytes:
            break
    if not text:
        raise ValueError(f"the text at {path or _standard_library()} is empty")
    return bytes(text)


def describe(path: str | None) -> str:
    """Which text `corpus(path)` reads, in words, for reports."""
    return path or f"the sources of Python {platform.python_version()}'s standard library"


def byte_batches(data: bytes, batch: int, length: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Batches of windows drawn at random from a text: tokens[count, batch, length], each 0 to 255.

    The same arguments give the same tokens on every machine. All of them are held at once (8 bytes a token):
    a long benchmark draws a few batches and cycles through them.

    Raises:
        ValueError: if the text is shorter than one window, or a size is below 1.
    """
    for name, value in (("batch", batch), ("length", length), ("count", count)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if len(data) < length:
        raise ValueError(f"the text has {len(data)} bytes, too few for one sequence of {length}")
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, dtype=np.uint8), length)
    starts = np.random.default_rng(seed).integers(0, len(windows), size=(count, batch))
    return windows[starts].astype(np.int64)


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))
