"""A GGUF's header walked once before its library reads it, which counts on beyond the end of a file for hours."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from helix.checkpoint.content import CheckpointError

_STRING, _ARRAY = 8, 9
# Bytes of a value by GGUF's number of its type.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TENSOR_BYTES = 24  # at least, of what is said of one


def check_header(file: Path) -> None:
    """Check that every length in a GGUF's header lies within the file.

    Raises:
        CheckpointError: if one does not.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            _Walk(content).header()
        except (struct.error, ValueError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged: what its header tells of is not in it ({error})") from None


class _Walk:
    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at = content, 4  # behind the magic
        self._order = "<" if content[4:6] != b"\0\0" else ">"

    def header(self) -> None:
        self._number("I")
        tensors, fields = self._number("Q"), self._number("Q")
        if tensors * _TENSOR_BYTES > len(self._content):
            raise ValueError(f"{tensors} tensors")
        for _ in range(fields):  # each of which takes bytes, so that a false number ends at the file's end
            self._skip(self._number("Q"))
            self._value(self._number("I"))

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY:
            of, count = self._number("I"), self._number("Q")
            if of in _BYTES:
                self._skip(count * _BYTES[of])
                return
            for _ in range(count):
                self._value(of)
        else:
            self._skip(_BYTES[kind])

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(self._order + form, self._content, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise ValueError(f"{count} bytes at {self._at - count}")
