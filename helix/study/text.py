"""Tokens: the bytes of a real text that every machine has.

The default text is the running Python's own standard library: the top-level `.py` files of its `stdlib`
folder, in the order of their names. It is English prose (docstrings, comments) and code, about 5 MB, needs no
download, and is the same on every machine with the same Python version. A byte is a token; the vocabulary is 256.
"""

from __future__ import annotations

import math
import platform
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt

LIMIT_BYTES = 4 << 20
# Of held-out text: long enough that few windows are lost at its ends, short enough that all parts of a text have some.
PIECE_BYTES = 16 << 10


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


class TrainingText:
    """A text cut into training windows, drawn at random, and held-out ones.

    The text is cut into pieces and the last one in every `held_out_every` of them is held out, so that validation is
    of the same kind of text as training, from all over it. A training window never touches a held-out piece.

    Sample k of the training is a pure function of (seed, k), and batch i has the samples from i * batch on. So the
    order is the same on every grid, for whole batches and for as many sequences accumulated from smaller ones, and
    to resume takes nothing but a number.

    Args:
        data: the text.
        batch: sequences of one batch over all replicas.
        length: tokens of a sequence; a window is one byte longer, its last token's successor.
        seed: of the order.
        held_out_every: one piece in so many.

    Raises:
        ValueError: if the text is too short to hold a window of each kind.
    """

    def __init__(self, data: bytes, batch: int, length: int, seed: int, held_out_every: int = 20) -> None:
        self.batch_size, self.length, self.seed = batch, length, seed
        self._text = np.frombuffer(data, dtype=np.uint8)
        piece = min(PIECE_BYTES, len(data) // held_out_every)
        # Longer than one window, however long that is: otherwise long sequences would have no held-out text.
        piece = max(piece, min(batch * (length + 1), len(data) // held_out_every))
        if piece <= length:
            raise ValueError(
                f"the text has {len(data)} bytes, too few to hold out one of {held_out_every} pieces that are longer "
                f"than a sequence of {length}"
            )
        ends = np.arange(held_out_every * piece, len(data) + 1, held_out_every * piece)
        self._held_out = [(int(end) - piece, int(end)) for end in ends]
        begins = np.array([0, *ends])
        stops = np.array([*(ends - piece), len(data)])
        room = stops - begins - length  # starts of windows in each stretch of training text
        self._begins, self._room = begins[room > 0], room[room > 0]
        self._before = np.cumsum(self._room) - self._room

    def samples(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Training windows [count, length + 1] from number `first` on."""
        total = int(self._room.sum())
        drawn = np.array([np.random.default_rng([self.seed, first + k]).integers(total) for k in range(count)])
        stretch = np.searchsorted(self._before, drawn, side="right") - 1
        return self._windows(self._begins[stretch] + drawn - self._before[stretch])

    def batch(self, number: int, replica: int = 0, replicas: int = 1) -> npt.NDArray[np.int64]:
        """A replica's share of a training batch: [batch / replicas, length + 1]."""
        own = self.batch_size // replicas
        return self.samples(number * self.batch_size + replica * own, own)

    def validation(self, batches: int, replica: int = 0, replicas: int = 1) -> list[npt.NDArray[np.int64]]:
        """A replica's share of at most `batches` whole batches of held-out windows, from all over the text.

        No two of them overlap in a token that is predicted.
        """
        starts = np.concatenate([np.arange(begin, end - self.length, self.length) for begin, end in self._held_out])
        count = min(batches, len(starts) // self.batch_size)
        chosen = starts[np.arange(count * self.batch_size) * len(starts) // (count * self.batch_size)]
        own = self.batch_size // replicas
        return [self._windows(one[replica * own :][:own]) for one in chosen.reshape(count, self.batch_size)]

    def _windows(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._text[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)


def unigram_entropy(data: bytes) -> float:
    """Entropy of a text's bytes in bits per byte: what a model that knows their frequencies alone would need."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    shares = counts[counts > 0] / len(data)
    return -math.fsum(shares * np.log2(shares))


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))
