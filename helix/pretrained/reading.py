"""A rank's parts of tensors, read from a folder's files: its own slices, through a small window.

The files are mapped, and a mapped page that was read counts as the process's memory until it is unmapped. A slice of
a matrix's columns touches every page of it, so that twelve ranks with a twelfth each would have the whole model in
each one's resident set. Hence the window: after that many bytes the file is mapped anew.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from helix.pretrained.cuts import Cut
from helix.pretrained.folder import Folder
from helix.pretrained.names import Source

WINDOW = 4 << 20  # bytes; opening a file anew takes 0.3 ms, reading 4 MiB some 2


class Reader:
    """Reads a folder's tensors, whole or cut."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._file: Any = None
        self._name, self._touched = "", 0

    def read(self, source: Source, shape: torch.Size, cut: Cut | None, dtype: torch.dtype) -> Tensor:
        """What a rank holds of a tensor.

        Args:
            shape: of the whole.
            cut: None for the whole.

        Returns:
            A tensor on the CPU, nobody else's; what the cut adds to the runs is zeros.
        """
        cut = cut if cut is not None else Cut(0, ((0, shape[0]),), (shape[0],))
        sizes = [*shape]
        sizes[cut.dim] = cut.length
        out = torch.empty(sizes, dtype=dtype)
        if cut.length > sum(stop - start for start, stop in cut.runs):
            out.zero_()
        if not source.stacked:
            ((key,),) = source.keys
            self._fill(key, cut.dim, _placed(cut, 0, shape[cut.dim]), out)
            return out
        for expert, keys in enumerate(source.keys):
            self._fill_stack(keys, cut.dim - 1, cut, out[expert])
        return out

    def _fill_stack(self, keys: tuple[str, ...], dim: int, cut: Cut, into: Tensor) -> None:
        """One expert's tensors, one under the other."""
        first = 0
        for key in keys:
            rows, *others = self.folder.tensors[key].shape
            if dim == 0:
                self._fill(key, 0, _placed(cut, first, first + rows), into)
            else:
                self._fill(key, dim, _placed(cut, 0, others[dim - 1]), into[first : first + rows])
            first += rows

    def _fill(self, key: str, dim: int, runs: list[tuple[int, int, int]], into: Tensor) -> None:
        """Copy runs (start, stop, where) of a stored tensor's dim to where they belong."""
        if dim == 0:
            for start, stop, at in runs:
                for a, b in self._windows(key, start, stop):
                    into[at + a - start : at + b - start].copy_(self._rows(key, a, b))
            return
        for a, b in self._windows(key, 0, self.folder.tensors[key].shape[0]):
            rows = self._rows(key, a, b)
            for start, stop, at in runs:
                into[a:b].narrow(dim, at, stop - start).copy_(rows.narrow(dim, start, stop - start))

    def _windows(self, key: str, start: int, stop: int) -> list[tuple[int, int]]:
        step = max(1, WINDOW // max(1, self._row_bytes(key)))
        return [(a, min(a + step, stop)) for a in range(start, stop, step)]

    def _row_bytes(self, key: str) -> int:
        stored = self.folder.tensors[key]
        return torch.Size(stored.shape[1:]).numel() * BYTES[stored.dtype]

    def _rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of a stored tensor, mapped: to be copied before the next call."""
        name, nbytes = self.folder.tensors[key].file, (stop - start) * self._row_bytes(key)
        if name != self._name or self._touched + nbytes > WINDOW:
            self._file = None  # unmapped before the next is mapped
            self._file = safe_open(self.folder.path / name, framework="pt")
            self._name, self._touched = name, 0
        self._touched += nbytes
        rows: Tensor = self._file.get_slice(key)[start:stop]
        return rows


# What Helix loads: numbers that are the weights themselves. Anything else is quantized.
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _placed(cut: Cut, first: int, last: int) -> list[tuple[int, int, int]]:
    """The runs inside [first, last), counted from `first`, and where each begins in the rank's dim."""
    out = []
    for (start, stop), at in zip(cut.runs, cut.places, strict=True):
        a, b = max(start, first), min(stop, last)
        if a < b:
            out.append((a - first, b - first, at + a - start))
    return out
