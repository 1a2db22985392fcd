"""Answers on the terminal while they grow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from helix.generation.answers import Answer
from helix.study.terminal import Terminal

_KEPT = "\n\t"


class View(Protocol):
    """Shows one batch: `begin`, `show` after each token, `end`."""

    def begin(self, prompts: Sequence[str]) -> None: ...

    def show(self, answers: Sequence[Answer]) -> None: ...

    def end(self, answers: Sequence[Answer]) -> None: ...


def view_for(prompts: int, chat: bool, console: Console | None = None) -> View:
    """The view of so many prompts on standard output: a terminal, or a file or pipe."""
    console = console or Terminal(highlight=False)
    if prompts == 1:
        return Stream(console, chat)
    return Board(console, chat) if console.is_terminal else Lines(console, chat)


def shown(text: str) -> str:
    """A text for a terminal, on which control characters would do what they mean."""
    return "".join(letter if letter.isprintable() or letter in _KEPT else "\ufffd" for letter in text)


class Stream:
    """One answer, each letter as soon as it is sure, after its prompt."""

    def __init__(self, console: Console, chat: bool) -> None:
        self.console, self._chat, self._written = console, chat, 0

    def begin(self, prompts: Sequence[str]) -> None:
        self._written = 0
        self._write(shown(prompts[0]) + ("\n" if self._chat else ""), style="dim")

    def show(self, answers: Sequence[Answer]) -> None:
        settled = answers[0].settled
        self._write(shown(settled[self._written :]))
        self._written = max(self._written, len(settled))

    def end(self, answers: Sequence[Answer]) -> None:
        self._write(shown(answers[0].text[self._written :]) + "\n\n")

    def _write(self, text: str, style: str | None = None) -> None:
        self.console.print(Text(text, style=style or ""), end="", soft_wrap=True)


class Lines:
    """Several answers where nothing can be overwritten: each when it has ended, after its number and prompt."""

    def __init__(self, console: Console, chat: bool) -> None:
        self.console, self._chat, self._before = console, chat, 0
        self._said: set[int] = set()

    def begin(self, prompts: Sequence[str]) -> None:
        self._prompts, self._said = prompts, set()

    def show(self, answers: Sequence[Answer]) -> None:
        for index, answer in enumerate(answers):
            if answer.finished:
                self._say(index, answer)

    def end(self, answers: Sequence[Answer]) -> None:
        for index, answer in enumerate(answers):
            self._say(index, answer)
        self._before += len(answers)
        self.console.print()

    def _say(self, index: int, answer: Answer) -> None:
        if index in self._said:
            return
        self._said.add(index)
        text = whole(self._before + index, self._prompts[index], answer.text, self._chat)
        self.console.print(text, soft_wrap=True)


class Board:
    """Several answers on a terminal: the end of each in a line of its own while they grow, all of them at the end."""

    def __init__(self, console: Console, chat: bool) -> None:
        self.console, self._chat, self._before = console, chat, 0

    def begin(self, prompts: Sequence[str]) -> None:
        self._prompts = prompts
        # Drawn when a token comes: a drawing thread would take a core from sixteen ranks.
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, answers: Sequence[Answer]) -> None:
        # The first ones, if the window is too low for all.
        rows = max(1, self.console.height - 2)
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right", style="dim")
        table.add_column(no_wrap=True)
        for index, answer in enumerate(answers[:rows]):
            table.add_row(str(self._before + index + 1), self._line(index, answer))
        if len(answers) > rows:
            table.add_row("", Text(f"and {len(answers) - rows} more", style="dim"))
        self._live.update(table, refresh=True)

    def end(self, answers: Sequence[Answer]) -> None:
        self._live.stop()
        for index, answer in enumerate(answers):
            self.console.print(
                whole(self._before + index, self._prompts[index], answer.text, self._chat), soft_wrap=True
            )
        self.console.print()
        self._before += len(answers)

    def _line(self, index: int, answer: Answer) -> Text:
        """The end of prompt and answer that a line has room for."""
        room = max(8, self.console.width - 6)
        turn = " → " if self._chat else ""
        line = Text.assemble((_flat(self._prompts[index]), "dim"), turn, _flat(answer.settled))
        if answer.finished:
            line.append(" ✓", style="green")
        while line.cell_len > room:  # a wide letter takes two cells
            line = line[max(1, (line.cell_len - room) // 2) :]
        return line


def whole(number: int, prompt: str, answer: str, chat: bool) -> Text:
    """A prompt and its answer, which goes on with it or replies to it, numbered from 1."""
    return Text.assemble((f"[{number + 1}] ", "bold"), (shown(prompt), "dim"), "\n" if chat else "", shown(answer))


def _flat(text: str) -> str:
    """In one line."""
    return shown(text).replace("\n", "⏎").replace("\t", " ")


def make_printable() -> None:
    """Have standard output take any text, whatever its encoding: what it lacks becomes a question mark."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
