"""What W&B's own reader finds in a run that was written without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helix.study.wandb_records import read_records


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's folder, in their order."""
    (file,) = run.glob("*.wandb")
    records, fault = read_records(file)
    assert fault is None, fault
    return records
