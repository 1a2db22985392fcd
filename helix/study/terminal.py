"""A console whose reader may go away."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class Terminal(Console):
    """Standard output for a run that is worth more than who reads it: `infer.py .. | head` still has its report.

    rich itself ends the process when a pipe was closed.
    """

    def on_broken_pipe(self) -> None:
        """Say nothing from here on, and have what is still buffered go nowhere."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
