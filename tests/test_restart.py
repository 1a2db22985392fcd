"""Kill -9 at any moment: training goes on from a whole checkpoint, and its losses equal the uninterrupted run's."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Command
from wandb_runs import wandb_records

from helix.checkpoint.manifest import checkpoints

STEPS = 12
SMALL = [
    "model.layers=1", "model.width=32", "model.heads=4", "model.head_dim=8", "model.mlp_hidden=48", "data.seq_len=24",
    "data.batch_size=4", "data.validation_batches=2", "data.limit_bytes=200000", f"trainer.max_steps={STEPS}",
    "trainer.validate_every_n_steps=5", "trainer.log_every_n_steps=3", "optimizer.warmup_steps=2", "logger=none",
    "trainer.save_every_n_steps=2", "trainer.keep_checkpoints=2",
]  # fmt: skip
Start = Callable[..., Command]
Whole = Callable[[str], Path]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `train.py` in a folder of the test's; nothing that it started outlives the test."""
    started: list[Command] = []

    def run(run_dir: Path, *overrides: str) -> Command:
        started.append(Command("train.py", f"hydra.run.dir={run_dir}", *SMALL, *overrides))
        return started[-1]

    yield run
    for process in started:
        process.kill()  # the ranks die with it
        process.wait(10)


def report_of(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "train_report.json").read_text())
    return report


def curves(report: dict[str, Any]) -> dict[str, Any]:
    """All that has to be the same, bit for bit, whatever happened on the way; JSON keeps every bit of a float."""
    return {name: report[name] for name in ("losses", "validations", "learning_rates", "gradient_norms", "steps")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a training on a grid that nothing happened to, trained at the first question."""
    folder = tmp_path_factory.mktemp("whole")

    def ask(grid: str) -> Path:
        if not (folder / grid).exists():
            process = Command("train.py", f"hydra.run.dir={folder / grid}", *SMALL, f"parallel={grid}")
            assert process.wait(60) == 0, process.read()[1]
        return folder / grid

    return ask


def ranks_of(process: Command) -> list[psutil.Process]:
    """Those that are running, by rank, which is the order in which they were forked."""
    return sorted(psutil.Process(process.pid).children(), key=lambda each: each.pid)


def wait_for(what: Callable[[], Any], process: Command, seconds: float = 60) -> Any:
    """The first answer that is true; None if the process ended before there was one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        if not psutil.pid_exists(process.pid):
            return None
        time.sleep(0.0005)
    raise AssertionError(f"nothing after {seconds} s: {process.read()[1]}")


def drafts(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").glob(".*.partial")]


def steps_saved(run_dir: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoints(run_dir / "checkpoints")]


@dataclass(frozen=True)
class Death:
    """One kill -9.

    Args:
        whole_job: the launcher is killed, and its ranks with it; else one rank, and the launcher starts all again.
        inside_save: as soon as a checkpoint is seen that is being written.
        after: steps that have been saved by then; 0 for a kill at any time from the start of the ranks on.
        delay_s: seconds after that.
        rank: which one.
    """

    whole_job: bool
    inside_save: bool
    after: int
    delay_s: float
    rank: int


def drawn(number: int) -> tuple[str, Death]:
    """The death of that number: every third inside a save, every fourth of the whole job, half on 4 ranks."""
    draw = random.Random(number)
    grid, ranks = [("helix_2x1", 2), ("helix_2x2", 4)][number % 2]
    inside, after = number % 3 == 0, draw.choice([0, 2, 4, 6, 8, 10])
    return grid, Death(number % 4 == 2, inside, after, 0 if inside else draw.uniform(0, 0.5), draw.randrange(ranks))


def kill(death: Death, process: Command, run_dir: Path) -> tuple[bool, int]:
    """Let it happen: was it inside a save, and how many steps had been saved by then?

    The training may have ended just before.
    """
    wait_for(lambda: len(ranks_of(process)) > death.rank, process)
    wait_for(lambda: death.after == 0 or max(steps_saved(run_dir), default=0) >= death.after, process)
    wait_for(lambda: not death.inside_save or drafts(run_dir), process)
    time.sleep(death.delay_s)
    saved = max(steps_saved(run_dir), default=0)
    try:
        os.kill(process.pid if death.whole_job else ranks_of(process)[death.rank].pid, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess, IndexError):
        return False, saved
    return bool(drafts(run_dir)), saved


def goes_on(start: Start, run_dir: Path, grid: str, death: Death) -> tuple[bool, int | None]:
    """Train through a death: whether it was inside a save, and after which step it went on, if it had to."""
    process = start(run_dir, f"parallel={grid}", "max_restarts=1")
    inside, saved = kill(death, process, run_dir)
    status = process.wait(60)
    if death.whole_job and status != 0:
        assert not (run_dir / "train_report.json").exists()
        # From the one at its end, if it came that far, there is nothing to go on to.
        found = [path for path in checkpoints(run_dir / "checkpoints") if not path.name.endswith(f"-{STEPS}")]
        assert start(run_dir, f"parallel={grid}", *(f"ckpt={path}" for path in found[-1:])).wait(60) == 0
        resumed = [piece["step"] for piece in report_of(run_dir)["resumed"]] or [0]
        assert resumed == ([int(found[-1].name.rpartition("-")[2])] if found else [0])
        assert resumed[0] >= min(saved, STEPS - 2)
        return inside, resumed[0]
    assert status == 0, process.read()[1]
    pieces = report_of(run_dir)["resumed"]
    said = re.findall(
        r"rank (\d) \(host .*\) was killed by SIGKILL during .*; .*; restart 1: training (.*)", process.read()[1]
    )
    if not pieces:
        assert not said
        return inside, None
    assert [int(rank) for rank, _ in said] == [death.rank]
    step, path = pieces[0]["step"], pieces[0]["checkpoint"]
    assert step >= saved
    assert said[0][1] == (
        f"goes on after step {step}, from {path}" if step else "begins anew: it had no checkpoint yet"
    )
    return inside, step


def dies_and_goes_on(number: int, start: Start, uninterrupted: Whole, run_dir: Path) -> tuple[bool, bool]:
    """Check that the training is as if nothing had happened: was the kill inside a save, and was it before the end?"""
    grid, death = drawn(number)
    whole = uninterrupted(grid)
    inside, step = goes_on(start, run_dir, grid, death)
    print(f"death {number}: {grid}, {death}; inside a save: {inside}; went on after step {step}")
    assert curves(report_of(run_dir)) == curves(report_of(whole))
    assert not drafts(run_dir)
    assert steps_saved(run_dir)[-1] == STEPS
    return inside, step is not None


@pytest.mark.parametrize("number", [0, 2], ids=["a rank inside a save", "the whole job"])
def test_training_goes_on_bit_for_bit(number: int, start: Start, uninterrupted: Whole, tmp_path: Path) -> None:
    _, hit = dies_and_goes_on(number, start, uninterrupted, tmp_path)
    assert hit
    assert len(checkpoints(tmp_path / "checkpoints")) == 2


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_twenty_deaths_at_any_moment(start: Start, uninterrupted: Whole, tmp_path: Path) -> None:
    deaths = [dies_and_goes_on(number, start, uninterrupted, tmp_path / str(number)) for number in range(20)]
    assert sum(inside for inside, _ in deaths) >= 3  # of the seven that are meant to be
    assert sum(hit for _, hit in deaths) >= 15


def test_the_curve_of_a_restarted_training_is_whole_in_wandb(
    start: Start, uninterrupted: Whole, tmp_path: Path
) -> None:
    """In a run of its own; that of the start before is finished, unless rank 0 itself was killed."""
    process = start(tmp_path, "parallel=helix_2x1", "logger=wandb", "max_restarts=1")
    kill(Death(False, False, 6, 0, rank=1), process, tmp_path)
    assert process.wait(60) == 0, process.read()[1]
    report = report_of(tmp_path)
    assert curves(report) == curves(report_of(uninterrupted("helix_2x1")))
    cut, whole = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert tmp_path / report["wandb"]["path"] == whole
    # What reached rank 0 first: the broken connection, or the signal that stopped it.
    assert wandb_records(cut)[-1]["exit"]["exit_code"] in (1, 128 + signal.SIGTERM)
    assert wandb_records(whole)[-1]["exit"]["exit_code"] == 0
    history = [record["history"]["item"] for record in wandb_records(whole) if record["type"] == "history"]
    assert [(item["_step"], item["train/loss"]) for item in history] == list(enumerate(report["losses"], 1))
    validated = {item["_step"]: item["validation/bpb"] for item in history if "validation/bpb" in item}
    assert validated == {each["step"]: each["bpb"] for each in report["validations"]}


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    start: Start, uninterrupted: Whole, tmp_path: Path
) -> None:
    folder, whole = tmp_path / "checkpoints", uninterrupted("helix_2x1")
    shutil.copytree(whole / "checkpoints", folder)
    first, second = (path / "rank-00001.safetensors" for path in checkpoints(folder))
    second.write_bytes(second.read_bytes()[:-5])  # truncated
    process = start(tmp_path / "one", "parallel=helix_2x1", f"ckpt={folder}")
    assert process.wait(60) == 0, process.read()[1]
    said = " ".join(process.read()[1].split())
    assert str(second) in said
    assert f"{first.parent.name} is taken instead" in said
    assert re.search(f" 2 steps in .* went on after step {STEPS - 2}, from ", " ".join(process.read()[0].split()))
    report = report_of(tmp_path / "one")
    assert report["resumed"] == [{"step": STEPS - 2, "checkpoint": str(first.parent), "reason": None}]
    assert curves(report) == curves(report_of(whole))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1  # altered
    first.write_bytes(content)
    process = start(tmp_path / "two", "parallel=helix_2x1", f"ckpt={folder}")
    assert process.wait(60) == 2
    assert "none of the 2 checkpoints" in process.read()[1]
    assert not (tmp_path / "two" / "train_report.json").exists()


@pytest.mark.benchmark
def test_ranks_that_torchrun_starts_again_go_on_in_the_first_starts_folder(
    start: Start, uninterrupted: Whole, tmp_path: Path
) -> None:
    name = "${now:%H-%M-%S-%f}"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = Command(
        *command, "train.py", f"hydra.run.dir={tmp_path}/{name}", *SMALL, "parallel=helix_2x1", "trainer.max_steps=40"
    )
    try:
        wait_for(lambda: any(steps_saved(folder) for folder in tmp_path.iterdir()), process)
        ranks_of(process)[1].kill()
        assert process.wait(60) == 0, process.read()[1]
    finally:
        process.kill()
    (report,) = tmp_path.glob("*/train_report.json")
    (piece,) = report_of(report.parent)["resumed"]
    assert piece["checkpoint"].startswith(str(report.parent))
    assert piece["step"] > 0
    assert f"restart 1: training goes on after step {piece['step']}, from {piece['checkpoint']}" in process.read()[1]
    assert len(report_of(report.parent)["losses"]) == 40
    # Nothing of how the first start failed, which a reader would take for this one's.
    assert not [*report.parent.glob("flight/*"), *report.parent.glob("failed.json"), *report.parent.glob(".room")]


@pytest.mark.parametrize(
    ("overrides", "env", "said"),
    [
        (
            ["trainer.save_every_n_steps=null"],
            {},
            "makes none on the way; choose a number of steps, or max_restarts=0",
        ),
        (
            [],
            {"RANK": "0", "WORLD_SIZE": "4"},
            "and torchrun started these; take max_restarts=0, and have the launcher",
        ),
    ],
)
def test_restarts_need_checkpoints_and_ranks_of_ones_own(
    overrides: list[str], env: dict[str, str], said: str, tmp_path: Path
) -> None:
    process = Command("train.py", f"hydra.run.dir={tmp_path}/one", *SMALL, "max_restarts=1", *overrides, env=env)
    assert process.wait(60) == 2
    assert said in process.read()[1]
    assert process.read()[1].count("\n") == 1
    assert list(tmp_path.iterdir()) == []
