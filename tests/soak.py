"""A long training of which a random rank is killed again and again: its curves have to be the undisturbed run's.

    python tests/soak.py --minutes 30 --every 60 --steps 1700 --to paper/results/2026-11-22_soak.json

Both trainings run side by side, by the command that a user types. Ranks are killed for as long as the disturbed one
runs, which depends on its steps: too few, and it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from helix.checkpoint.manifest import checkpoints
from helix.study.provenance import command, git_commit, machine, now, versions
from helix.study.report import write_whole

ROOT = Path(__file__).resolve().parent.parent
SAME = ("steps", "losses", "validations", "learning_rates", "gradient_norms", "validation_bpb")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Args:
        after_s: since the training was started.
        rank: that was hit.
        saved_step: of the newest whole checkpoint then.
        inside_save: whether another was being written.
    """

    after_s: float
    rank: int
    saved_step: int
    inside_save: bool


class Training:
    """`train.py` on 2 x 2 ranks as a process of its own, with what it says in files beside its folder."""

    def __init__(self, folder: Path, steps: int, restarts: int) -> None:
        self.folder, self.began, self.lasted_s = folder, time.monotonic(), 0.0
        self.output = folder.with_suffix(".log")
        overrides = [
            "parallel=helix_2x2", f"trainer.max_steps={steps}", "trainer.save_every_n_steps=10",
            "trainer.validate_every_n_steps=200", f"max_restarts={restarts}", f"hydra.run.dir={folder}",
        ]  # fmt: skip
        with self.output.open("w") as output:
            self.process = psutil.Popen(
                [sys.executable, "train.py", *overrides],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=environment(folder.parent),
            )

    def runs(self) -> bool:
        """Whether it does; the first answer that it doesn't notes how long it did."""
        running = self.process.poll() is None
        if not running and not self.lasted_s:
            self.lasted_s = round(time.monotonic() - self.began, 1)
        return running

    def ranks(self) -> list[psutil.Process]:
        """Those that are running, in the order in which they were forked."""
        try:
            return sorted(self.process.children(), key=lambda each: each.pid)
        except psutil.NoSuchProcess:
            return []

    def saved_step(self) -> int:
        return max((int(path.name.rpartition("-")[2]) for path in checkpoints(self.folder / "checkpoints")), default=0)

    def kill_one(self, draw: random.Random) -> Kill | None:
        """Kill a random rank; None while the four are not all there."""
        ranks = self.ranks()
        if len(ranks) != 4:
            return None
        rank = draw.randrange(4)
        inside = any((self.folder / "checkpoints").glob(".*.partial"))
        kill = Kill(round(time.monotonic() - self.began, 1), rank, self.saved_step(), inside)
        try:
            ranks[rank].send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # it has just ended by itself
            return None
        return kill

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "train_report.json").read_text())
        return report


def temporary(folder: Path) -> Path:
    """Where both trainings put what is theirs alone and for a while."""
    return folder / "tmp"


def environment(folder: Path) -> dict[str, str]:
    temporary(folder).mkdir(exist_ok=True)
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TMPDIR": str(temporary(folder))}


@contextmanager
def both(folder: Path, steps: int, restarts: int) -> Iterator[tuple[Training, Training]]:
    """The undisturbed training and the other, which end with this block."""
    started = [Training(folder / "undisturbed", steps, 0), Training(folder / "disturbed", steps, restarts)]
    try:
        yield started[0], started[1]
    finally:
        for each in started:
            if each.process.poll() is None:
                each.process.kill()  # the ranks die with it
                each.process.wait(10)


def disturb(training: Training, other: Training, every_s: float, draw: random.Random) -> list[Kill]:
    """Kill a rank every so often until the training has ended; shows how far both are."""
    kills: list[Kill] = []
    next_s = every_s
    with Progress(TextColumn("{task.description}"), transient=True) as progress:
        task = progress.add_task("")
        while [each for each in (training, other) if each.runs()]:
            passed = time.monotonic() - training.began
            progress.update(
                task,
                description=f"{passed / 60:.1f} min, {len(kills)} killed; step {training.saved_step()} of the "
                f"disturbed training, {other.saved_step()} of the other",
            )
            if passed >= next_s and training.runs() and (kill := training.kill_one(draw)):
                kills.append(kill)
                next_s += every_s
            time.sleep(draw.uniform(0.2, 1.0))  # not in step with what the training does
    return kills


def left_behind(folder: Path) -> list[str]:
    """What is still there of both trainings: temporary files, and processes, which have their environment."""
    # Torch keeps a cache there for all of a user's processes.
    names = [path.name for path in temporary(folder).iterdir() if not path.name.startswith("torchinductor_")]
    found = [f"temporary {name}" for name in names]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(temporary(folder)):
                found.append(f"process {process.pid}: {' '.join(process.cmdline())}")
    return found


def went_on(training: Training) -> list[tuple[int, int, int]]:
    """Each restart that came to training again: the rank that was killed, the restart's number, the step."""
    found = re.findall(
        r"rank (\d+)\b.*; restart (\d+): training goes on after step (\d+)", training.output.read_text()
    )
    return [(int(rank), int(number), int(step)) for rank, number, step in found]


def verdict(disturbed: Training, undisturbed: Training, kills: list[Kill], minutes: float) -> list[str]:
    """What is not as it has to be."""
    codes = disturbed.process.returncode, undisturbed.process.returncode
    if codes != (0, 0):
        return [f"exit codes {codes}: {disturbed.output.read_text()[-2000:]}"]
    one, other = disturbed.report(), undisturbed.report()
    faults = [f"{key} differ" for key in SAME if one[key] != other[key]]
    # One that is killed before it has come to training again says nothing; the next one's number counts it.
    for rank, number, step in went_on(disturbed):
        kill = kills[number - 1]
        if rank != kill.rank or step < kill.saved_step:
            faults.append(f"{kill}: restart {number} went on from step {step}, after rank {rank}")
    if not kills or went_on(disturbed)[-1:] == [] or went_on(disturbed)[-1][1] != len(kills):
        faults.append(f"{len(kills)} ranks were killed, and the restarts were {went_on(disturbed)}")
    if list((disturbed.folder / "checkpoints").glob(".*.partial")):
        faults.append("a half-written checkpoint is left")
    if kills and kills[-1].after_s < (minutes - 2) * 60:
        faults.append(f"the training ended after {kills[-1].after_s / 60:.1f} min; give it more steps")
    return faults


def show(result: dict[str, Any]) -> None:
    table = Table("", "disturbed", "undisturbed", title="A training with and without killed ranks", box=None)
    table.add_row("ranks killed", str(len(result["kills"])), "0")
    table.add_row("of them inside a save", str(sum(kill["inside_save"] for kill in result["kills"])), "")
    table.add_row("minutes", *(f"{result[name]['wall_s'] / 60:.1f}" for name in ("disturbed", "undisturbed")))
    table.add_row("steps", *(str(result[name]["steps"]) for name in ("disturbed", "undisturbed")))
    table.add_row("last loss", *(repr(result[name]["last_loss"]) for name in ("disturbed", "undisturbed")))
    console = Console()
    console.print(table)
    for fault in result["faults"]:
        console.print(f"FAULT: {fault}", style="red")


def told(training: Training) -> dict[str, Any]:
    report = training.report() if training.process.returncode == 0 else {}
    losses = report.get("losses") or [None]
    return {
        "wall_s": training.lasted_s,
        "steps": report.get("steps"),
        "last_loss": losses[-1],
        "bpb": report.get("validation_bpb"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="that the disturbed training has to last at least")
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="between two kills")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, metavar="FILE", help="where the result is written")
    asked = parser.parse_args()
    began = now()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        # More restarts than there can be kills: the training's own limit is not what is tried.
        with both(Path(folder), asked.steps, restarts=1000) as (undisturbed, disturbed):
            kills = disturb(disturbed, undisturbed, asked.every, random.Random(asked.seed))
        faults = verdict(disturbed, undisturbed, kills, asked.minutes)
        faults += [f"left behind: {what}" for what in left_behind(Path(folder))]
        result = {
            "started_at": began,
            "command": command(),
            "commit": git_commit(),
            "versions": versions(),
            "machine": machine(),
            "kills": [asdict(kill) for kill in kills],
            "went_on": [{"restart": number, "after_step": step} for _, number, step in went_on(disturbed)],
            "disturbed": told(disturbed),
            "undisturbed": told(undisturbed),
            "faults": faults,
        }
    show(result)
    if asked.to is not None:
        write_whole(json.dumps(result, indent=2) + "\n", asked.to)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
