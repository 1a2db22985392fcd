"""What W&B's own reader finds in a run that was written without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from commands import Command


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's folder, in their order."""
    (file,) = run.glob("*.wandb")
    process = Command(str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file))
    assert process.wait() == 0, process.read()[1]
    return [json.loads(line) for line in process.read()[0].splitlines() if line.startswith("{")]
