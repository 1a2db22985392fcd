"""The inference benchmark: python infer.py parallel=helix_4x4 model=moe; and text: model=smollm2 prompt="Hello"

`python infer.py --help` lists the config groups; docs/runs.md says what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helix.command.cli import command, stop
from helix.command.sweep import SweepJob
from helix.config.schema import PRETRAINED, ConfigError, InferConfig, PartitionError
from helix.generation.asked import check


def collect(folder: Path, jobs: Sequence[SweepJob]) -> None:
    """A sweep's end: one table of all its jobs, and its plots."""
    from helix.study.sweep import collect

    collect(folder, jobs)


def agree(words: list[str]) -> list[str]:
    """Rank 0's words, on every rank that a launcher started."""
    from helix.comm.launch import agree

    return agree(words)


@command("infer", conf=Path(__file__).resolve().parent / "conf", collect=collect, agree=agree, check=check)
def main(settings: InferConfig, run_dir: Path) -> None:
    """Run what was configured; torch is imported from here on, when nothing is wrong any more."""
    from helix.checkpoint.content import CheckpointError
    from helix.comm.launch import RankError
    from helix.generation.errors import CannotRun, Diverged

    try:
        if settings.dry_run:
            from helix.dryrun.run import run as trace

            trace(settings, run_dir=run_dir)
        elif settings.model.kind == PRETRAINED:
            from helix.generation.run import run as generate

            generate(settings, run_dir=run_dir)
        else:
            from helix.study.inference import run

            run(settings, run_dir=run_dir)
    except (RankError, Diverged, CannotRun) as error:
        stop(str(error), code=1)
    # A checkpoint or a model's folder that does not say what it is, or has gone since; a prompt that is too long.
    except (CheckpointError, ConfigError, PartitionError) as error:
        stop(str(error), code=2)


if __name__ == "__main__":
    main()
