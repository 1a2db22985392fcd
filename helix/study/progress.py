"""The progress bar of what is measured."""

from __future__ import annotations

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(stderr: bool = False) -> Progress:
    """A bar on rank 0's terminal. Drawn by `refresh` alone: a drawing thread would be measured too.

    Args:
        stderr: draw on standard error, if that is a terminal, and wipe the bar at the end.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=stderr)
    silent = dist.get_rank() != 0 or (stderr and not console.is_terminal)
    return Progress(*columns, console=console, disable=silent, auto_refresh=False, transient=stderr)
