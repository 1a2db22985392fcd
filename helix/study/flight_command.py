"""`python -m helix flight FOLDER`: the flight records of a run's ranks beside each other, and where they part."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.flight.reading import Noted, Record, read, verdict
from helix.study.terminal import Terminal


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a run that failed; its records are in flight/")


def run(options: argparse.Namespace) -> None:
    """Print each rank's last collective, and where the ranks part.

    Raises:
        ConfigError: if the folder holds no records.
    """
    show(read(options.folder))


def show(records: list[Record], console: Console | None = None) -> None:
    (console or Terminal()).print(render(records))


def render(records: list[Record]) -> RenderableType:
    """The records, for any rich console."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rank", justify="right")
    table.add_column("host", overflow="fold")
    table.add_column("phase", overflow="fold")
    table.add_column("last collective", overflow="fold", ratio=1)
    table.add_column("after", justify="right", no_wrap=True)
    began = min((record.entries[0].came_at for record in records if record.entries), default=0.0)
    for record in records:
        last = record.entries[-1] if record.entries else None
        table.add_row(str(record.rank), record.host, record.phase, *_last(last, began))
    return Group(table, Text(), Text(verdict(records)))


def _last(entry: Noted | None, began: float) -> tuple[str, str]:
    if entry is None:
        return "none", ""
    state = "in it" if entry.state == "was in" else entry.state
    return f"{entry.what}, number {entry.number} of the {entry.axis} axis, {state}", f"{entry.came_at - began:.1f} s"
