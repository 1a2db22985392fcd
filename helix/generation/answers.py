"""A prompt's answer as it grows: its tokens, its text, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# How much of the prompt a tokenizer is shown to decode what follows as its continuation: some leave out a first space.
_BEFORE = 8
_INCOMPLETE = "\ufffd"  # a letter of which only some bytes are there


class Answer:
    """One prompt's answer.

    Args:
        tokenizer: see `helix.generation.tokens.read_tokenizer`.
        prompt: its tokens.
        ends: tokens that end it, and are no part of its text.
        stop: texts that do.

    Attributes:
        tokens: those of its text.
        count: tokens that the model gave, one that ended it included.
        finished: whether it has ended by itself; an answer may also be cut off.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], ends: frozenset[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._before = tokenizer, list(prompt[-_BEFORE:])
        self._ends, self._stop = ends, tuple(stop)
        self._hidden = len(self._decode(self._before))
        # A token is a byte at least, so that so many hold a stop text that the last of them completes.
        self._tail = max((len(text.encode()) for text in self._stop), default=0) + _BEFORE
        self.tokens: list[int] = []
        self.count, self.finished = 0, False

    def put(self, token: int) -> None:
        """Take the next token; nothing once it has ended, when only padding follows."""
        if self.finished:
            return
        self.count += 1
        if token in self._ends:
            self.finished = True
            return
        self.tokens.append(token)
        self.finished = bool(self._stop) and self._cut(self._end()) is not None

    @property
    def text(self) -> str:
        """All of it, up to a stop text."""
        decoded = self._decoded()
        cut = self._cut(decoded)
        return decoded if cut is None else decoded[:cut]

    @property
    def settled(self) -> str:
        """What no later token can change: without half a letter, or what may become a stop text."""
        decoded = self._decoded()
        cut = self._cut(decoded)
        if cut is not None:
            return decoded[:cut]
        if self.finished:
            return decoded
        decoded = decoded.rstrip(_INCOMPLETE)
        held = max((_overlap(decoded, stop) for stop in self._stop), default=0)
        return decoded[: len(decoded) - held]

    def _cut(self, text: str) -> int | None:
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return min(found, default=None)

    def _decoded(self) -> str:
        return self._decode(self._before + self.tokens)[self._hidden :]

    def _end(self) -> str:
        """Enough of it to see that a stop text is complete, at a cost that does not grow with the answer."""
        return self._decoded() if len(self.tokens) <= self._tail else self._decode(self.tokens[-self._tail :])

    def _decode(self, tokens: list[int]) -> str:
        decoded: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text are the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
