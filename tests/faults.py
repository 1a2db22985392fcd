"""The fault matrix: in each phase of a job a rank is killed, crashed, stopped, cut off, starved; how does the job end?

    python -m tests.faults                       all of it, as a table; ten minutes on two cores
    python -m tests.faults --phases save --faults killed stopped --json out.json

Faults come from outside: a rank says its phase (`helix.comm.activity`), is stopped in it, and once it is seen to be in
it still, gets its fault: a signal, a limit (`prlimit`), or its host's cable drawn. Nothing in the library knows of it.
Jobs are forked ranks of one command, or torchrun's on two hosts made of network namespaces (tests/hosts.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from commands import Command
from hosts import Host, hosts, why_not
from texts import write_folder

from helix.study.wandb_records import read_run

PHASES = ("start", "load", "warm-up", "measurement", "save", "generation", "training", "checkpoint")
FORKED = ("killed", "crashed", "stopped", "no memory", "no files")
HOSTS = ("killed", "stopped", "cut off")
LIMIT_S = {"stopped": 30.0, "cut off": 30.0}  # of the others 15 s
_SIZE = ["model.layers=2", "model.width=64", "model.heads=4", "model.head_dim=16", "model.mlp_hidden=64"]
_INFER = ["infer.py", "model=dense", *_SIZE, "workload.batch_size=1", "workload.iterations=20", "logger=wandb"]
_LONG = ["workload.runs=3", "workload.iterations=100000", "workload.seq_len=32"]
# Tensors of 64 MiB, which malloc asks the kernel for each time, so that a limit is met.
_LARGE = ["workload.runs=3", "workload.iterations=1000", "workload.seq_len=2048", "model.mlp_hidden=16384"]
_TRAIN = [
    "train.py", "model.layers=2", "model.width=64", "model.heads=4", "model.head_dim=16", "model.mlp_hidden=64",
    "data.limit_bytes=200000", "data.batch_size=4", "trainer.max_steps=100000", "trainer.log_every_n_steps=2",
    "trainer.save_every_n_steps=3", "trainer.keep_checkpoints=2", "data.validation_batches=2", "logger=wandb",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One job and what happens to it: on two `hosts`, or to forked ranks."""

    phase: str
    fault: str
    hosts: bool = False

    @property
    def limit_s(self) -> float:
        return LIMIT_S.get(self.fault, 15.0)

    @property
    def command(self) -> list[str]:
        large = self.fault == "no memory"
        grid = "parallel=helix_2x2" if self.hosts else "parallel=helix_2x1"
        if self.phase in ("training", "checkpoint"):
            seq_len = ["data.seq_len=1024", "model.mlp_hidden=16384"] if large else ["data.seq_len=32"]
            return [*_TRAIN, grid, *seq_len]
        if self.phase == "generation":
            work = ["workload.runs=3", "workload.iterations=100000", "generate.max_new_tokens=20", "prompt=Hello"]
            return ["infer.py", "model=pretrained", "model.path={models}", *work, "logger=wandb", grid]
        if self.phase == "save":
            return [*_INFER, grid, "workload.runs=2", "workload.seq_len=32"]
        warmup = ["workload.warmup=100000"] if self.phase == "warm-up" else []
        return [*_INFER, grid, *(_LARGE if large else _LONG), *warmup]


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Args:
        seconds: from the fault to the end of the last process.
        said: lines of standard error that are a message; of all hosts.
        lines: of standard error that are none, torchrun's own left out.
        records: of history.jsonl.
        wandb: state of the W&B run as `load_runs` has it; None if there was none yet.
        left: processes and temporary files that are still there.
    """

    cell: Cell
    seconds: float
    exit_codes: tuple[int, ...]
    said: tuple[str, ...]
    lines: int
    records: int
    failed: dict[str, Any] | None
    wandb: str | None
    left: tuple[str, ...]
    stuck: bool = False

    @property
    def fault(self) -> str:
        """What is not as it should be; empty if all is."""
        names = bool(self.said) and all(re.search(r"(rank \d+) \(host \S+\) .* during ", each) for each in self.said)
        checks = {
            f"ended after {self.seconds:.1f} s": not self.stuck and self.seconds <= self.cell.limit_s,
            f"exit codes {self.exit_codes}": all(code == 1 for code in self.exit_codes),
            f"{len(self.said)} messages": len(self.said) in ((1, 2) if self.cell.hosts else (1,)),
            "no rank, host and phase": names,
            f"{self.lines} other lines": self.cell.hosts or self.lines == 0,
            f"left: {', '.join(self.left)}": not self.left,
            "no failed.json": self.failed is not None,
            f"W&B run {self.wandb}": self.wandb in ("failed", None) or self.cell.hosts,
        }
        return "; ".join(said for said, fine in checks.items() if not fine)


def spoil(cell: Cell, folder: Path, models: Path) -> Ending:
    """Run a job, have its fault happen, and see how it ends."""
    temp, out = folder / "tmp", folder / "out"
    temp.mkdir(parents=True)
    env = {"TMPDIR": str(temp), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [each.format(models=models) for each in cell.command] + [f"hydra.run.dir={out}"]
    with ExitStack() as stack:
        made: list[Host] = list(stack.enter_context(hosts(2))) if cell.hosts else []
        jobs = _on_hosts(made, command, env, folder) if made else [_Forked(command, env)]
        try:
            rank = _caught(cell, temp, jobs, made)
            _befall(cell, rank, made)
            return _watched(cell, jobs, temp, out)
        finally:
            for job in jobs:
                job.kill()


class _Forked:
    """A command with forked ranks."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._command = Command(*command, env=env)

    def ended(self) -> bool:
        return self._command.returncode is not None or not psutil.pid_exists(self._command.pid)

    def result(self) -> tuple[int, str]:
        return self._command.wait(5), self._command.read()[1]

    def kill(self) -> None:
        self._command.kill()


class _Torchrun:
    """A host's torchrun; it ends with its ranks."""

    def __init__(self, host: Host, words: list[str], env: dict[str, str], folder: Path) -> None:
        self._errors = folder / f"{host.name}.err"
        with self._errors.open("w") as errors:
            self._process = host.popen(words, env=env, stdout=errors, stderr=errors)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> tuple[int, str]:
        return int(self._process.returncode), self._errors.read_text()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _on_hosts(made: list[Host], command: list[str], env: dict[str, str], folder: Path) -> list[Any]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-id=faults"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={made[0].name}:29400", *command]
    return [_Torchrun(host, words, env, folder) for host in made]


def _caught(cell: Cell, temp: Path, jobs: Sequence[Any], made: list[Host]) -> int:
    """The process of a rank that is in the phase, and stopped in it; not rank 0's, and on the second host."""
    wanted = {"generation": "generation, run", "checkpoint": "save"}.get(cell.phase, cell.phase)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for pid, phase in _said(cell, temp, made):
            if phase.startswith(wanted):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    if any(each == (pid, phase) for each in _said(cell, temp, made)):
                        return pid
                    os.kill(pid, signal.SIGCONT)
        if any(job.ended() for job in jobs):
            break
        time.sleep(0.002)
    raise RuntimeError(f"{cell}: no rank was met in this phase; {[job.ended() and job.result() for job in jobs]}")


def _said(cell: Cell, temp: Path, made: list[Host]) -> Iterator[tuple[int, str]]:
    """Process and phase of the rank that is to be met, as it says itself."""
    if not cell.hosts:
        records = list(temp.glob("helix-launch-*/ranks-*/1.activity"))
    else:
        records = list(temp.glob("torchelastic_*/*/attempt_0/1/activity"))
    outer: dict[int, int] = {}
    for record in records:
        with suppress(OSError, ValueError):
            pid, phase = record.read_text().split(maxsplit=1)
            if not cell.hosts:
                yield int(pid), phase
                continue
            outer = outer or _numbers(made[1])
            if int(pid) in outer and str(temp) in _environment(outer[int(pid)]):
                yield outer[int(pid)], phase


def _numbers(host: Host) -> dict[int, int]:
    """The host's own numbers of its processes, and ours."""
    found = {}
    for pid in host.processes():
        with suppress(OSError):
            numbers = re.search(r"NSpid:\s+(.*)", Path(f"/proc/{pid}/status").read_text())
            if numbers:
                found[int(numbers[1].split()[-1])] = pid
    return found


def _environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


def _befall(cell: Cell, pid: int, made: list[Host]) -> None:
    """The fault, to a rank that is stopped."""
    if cell.fault == "no memory":
        used = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (used, used))
    elif cell.fault == "no files":
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0))
    elif cell.fault == "cut off":
        made[1].cut()
    elif cell.fault != "stopped":
        os.kill(pid, {"killed": signal.SIGKILL, "crashed": signal.SIGSEGV}[cell.fault])
    if cell.fault != "stopped":
        os.kill(pid, signal.SIGCONT)


def _watched(cell: Cell, jobs: Sequence[Any], temp: Path, out: Path) -> Ending:
    began = time.monotonic()
    while not all(job.ended() for job in jobs) and time.monotonic() - began < cell.limit_s + 15:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    stuck = [job for job in jobs if not job.ended()]
    # W&B's own process ends by itself within a second or two of its run's.
    left: list[str] = []
    while time.monotonic() - began < seconds + 3 and (left := _left(temp)):
        time.sleep(0.1)
    for job in stuck:
        job.kill()
    results = [job.result() for job in jobs]
    lines = [line for _, text in results for line in text.splitlines() if line.strip()]
    said = tuple(line for line in lines if re.match(r"(infer|train)\.py: error: ", line))
    history, failed = out / "history.jsonl", out / "failed.json"
    return Ending(
        cell,
        round(seconds, 1),
        tuple(code for code, _ in results),
        said,
        len(lines) - len(said),
        len(history.read_text().splitlines()) if history.exists() else 0,
        json.loads(failed.read_text()) if failed.exists() else None,
        _state(out),
        tuple(left),
        bool(stuck),
    )


def _left(temp: Path) -> list[str]:
    """Processes that have the job's environment, with their ports, and its temporary files but torchrun's own."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if f"TMPDIR={temp}" in _environment(process.pid) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.name()} {process.pid}")
    return found + [each.name for each in temp.iterdir() if not each.name.startswith("torchelastic_")]


def _state(out: Path) -> str | None:
    files = sorted(out.glob("wandb/*run-*/run-*.wandb"))
    return read_run(files[-1]).state if files else None


def cells(phases: Sequence[str], faults: Sequence[str]) -> list[Cell]:
    """All cells of the matrix that are asked for, and can be made here."""
    forked = [Cell(phase, fault) for phase in phases for fault in FORKED if fault in faults]
    several = [Cell(phase, fault, hosts=True) for phase in phases for fault in HOSTS if fault in faults]
    return forked + (several if not why_not() else [])


def run(asked: Sequence[Cell], folder: Path, at_once: int = 4, told: Callable[[Ending], None] = print) -> list[Ending]:
    """All endings, in order; `told` hears of each as it comes."""
    models = folder / "models"
    write_folder(models)

    def one(numbered: tuple[int, Cell]) -> Ending:
        number, cell = numbered
        ending = spoil(cell, folder / str(number), models)
        told(ending)
        return ending

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, enumerate(asked)))


def table(endings: Sequence[Ending]) -> Table:
    """Phase by fault, as the README shows it."""
    shown = Table(title="A rank's faults, and how its job ends", title_justify="left")
    for name in ("phase", "fault", "ranks"):
        shown.add_column(name, no_wrap=True)
    for name in ("s", "exit", "kept"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("said")
    shown.add_column("wrong", style="red")
    for each in endings:
        said = [re.sub(r"^.*error: |; the other ranks were stopped.*$", "", line) for line in each.said]
        shown.add_row(
            each.cell.phase, each.cell.fault, "2 hosts" if each.cell.hosts else "forked", f"{each.seconds:.1f}",
            ",".join(map(str, each.exit_codes)), str(each.records), "\n".join(said), each.fault,
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--faults", nargs="+", default=(*FORKED, "cut off"), choices=(*FORKED, "cut off"))
    parser.add_argument("--at-once", type=int, default=4, help="jobs at a time")
    parser.add_argument("--json", type=Path, help="where all endings are written")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="helix-faults-") as folder:
        endings = run(cells(asked.phases, asked.faults), Path(folder), asked.at_once, lambda each: None)
    Console(width=120).print(table(endings))
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(each) | {"wrong": each.fault} for each in endings], indent=1) + "\n")
    raise SystemExit(any(each.fault for each in endings))


if __name__ == "__main__":
    main()
