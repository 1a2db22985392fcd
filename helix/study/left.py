"""What a job that failed has left in its folder: why, and what it had measured by then.

failed.json     the sentence; the rank, its host and what it was doing; its traceback, if it raised
history.jsonl   a line for each record that was logged, in all starts of the ranks; a job that ends well removes it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helix.command.sweep import FAILED
from helix.study.wandb_records import columns

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Left:
    """By `failed.json`'s keys why a job failed, and its history by W&B's names; both empty if it did not."""

    failed: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, list[Any]] = field(default_factory=dict)


def left_in(folder: Path, faults: list[str]) -> Left:
    """What the job of a folder has left; `faults` gets what cannot be read."""
    try:
        failed = json.loads((folder / FAILED).read_bytes())
        if not isinstance(failed, dict):
            raise TypeError("it is no mapping")
        return Left({key: value for key, value in failed.items() if key != "traceback"}, _history(folder / HISTORY))
    except FileNotFoundError:
        return Left()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        faults.append(f"{folder}: what its job has left cannot be read ({error}); left out")
        return Left()


def _history(path: Path) -> dict[str, list[Any]]:
    """A record for each step, as W&B has it; ranks that were started again have come to some steps twice."""
    steps: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else []):
        try:
            record = dict(json.loads(line))
        except (ValueError, TypeError):  # cut off on a full disk, and the next start's first line behind it
            continue
        step = record.get("_step")
        key = ("line", number) if step is None else step
        steps[key] = steps.get(key, {}) | record  # the later value of a step counts
    return columns(steps.values())
