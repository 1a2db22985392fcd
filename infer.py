"""The inference benchmark: python infer.py parallel=helix_4x4 model=moe; and text: model=smollm2 prompt="Hello"

`python infer.py --help` lists the config groups; docs/runs.md says what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helix.command.cli import command
from helix.command.sweep import SweepJob
from helix.config.schema import PRETRAINED, InferConfig
from helix.generation.asked import check


def collect(folder: Path, jobs: Sequence[SweepJob]) -> None:
    """A sweep's end: one table of all its jobs, and its plots."""
    from helix.study.sweep import collect

    collect(folder, jobs)


def agree(words: list[str]) -> list[str]:
    """Rank 0's words, on every rank that a launcher started."""
    from helix.ranks.launch import agree

    return agree(words)


@command("infer", conf=Path(__file__).resolve().parent / "conf", collect=collect, agree=agree, check=check)
def main(settings: InferConfig, run_dir: Path) -> None:
    """Run what was configured; torch is imported from here on, when nothing is wrong any more."""
    from helix.flight.checking import Disagreement
    from helix.generation.errors import CannotRun, Diverged
    from helix.study.failing import ending

    with ending(run_dir, Disagreement, Diverged, CannotRun):
        if settings.dry_run:
            from helix.dryrun.run import run as trace

            trace(settings, run_dir=run_dir)
        elif settings.model.kind == PRETRAINED:
            from helix.generation.run import run as generate

            generate(settings, run_dir=run_dir)
        else:
            from helix.study.inference import run

            run(settings, run_dir=run_dir)


if __name__ == "__main__":
    main()
