"""Training a byte-level language model: python train.py model=dense parallel=helix_2x2

`python train.py --help` lists the config groups; docs/training.md says what the curves and the report hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helix.checkpoint.asked import check_resumed_training
from helix.command.cli import command
from helix.command.sweep import SweepJob
from helix.config.train_schema import TrainConfig


def collect(folder: Path, jobs: Sequence[SweepJob]) -> None:
    """A sweep's end: its tables and its picture."""
    from helix.training.sweep import collect

    collect(folder, jobs)


def agree(words: list[str]) -> list[str]:
    """Rank 0's words, on every rank that a launcher started."""
    from helix.ranks.launch import agree

    return agree(words)


CONF = Path(__file__).resolve().parent / "conf"


@command("train", conf=CONF, collect=collect, agree=agree, schema=TrainConfig, check=check_resumed_training)
def main(settings: TrainConfig, run_dir: Path) -> None:
    """Train what was configured; torch is imported from here on, when nothing is wrong any more."""
    from helix.flight.checking import Disagreement
    from helix.study.failing import ending
    from helix.training.run import run

    with ending(run_dir, Disagreement):
        run(settings, run_dir=run_dir)


if __name__ == "__main__":
    main()
