"""Jobs for the fault matrix (tests/faults.py): their command lines, how a rank is met in a phase, and its fault."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from commands import Command
from hosts import Host

PHASES = ("start", "load", "warm-up", "measurement", "save", "generation", "training", "checkpoint")
FORKED = ("killed", "crashed", "stopped", "rank 0 killed", "no memory", "full disk")
HOSTS = ("killed", "stopped", "cut off")
LIMIT_S = {"stopped": 30.0, "cut off": 30.0}  # of the others 15 s
_SIZE = ["model.layers=2", "model.width=64", "model.heads=4", "model.head_dim=16", "model.mlp_hidden=64"]
_INFER = ["infer.py", "model=dense", *_SIZE, "workload.batch_size=1", "workload.iterations=20", "logger=wandb"]
_LONG = ["workload.runs=1000", "workload.iterations=10", "workload.seq_len=32"]
# Tensors of 64 MiB, which malloc asks the kernel for each time, so that a limit is met.
_LARGE = [
    "workload.runs=1000",
    "workload.iterations=2",
    "workload.warmup=1",
    "workload.seq_len=2048",
    "model.mlp_hidden=16384",
]
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
    def rank(self) -> int:
        """Whom it befalls, of forked ranks; of hosts it is the last one of the second."""
        return 0 if self.fault in ("rank 0 killed", "full disk") else 1

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
            work = ["workload.runs=1000", "workload.iterations=2", "generate.max_new_tokens=20", "prompt=Hello"]
            return ["infer.py", "model=pretrained", "model.path={models}", *work, "logger=wandb", grid]
        if self.phase == "save":
            return [*_INFER, grid, "workload.runs=2", "workload.seq_len=32"]
        warmup = ["workload.warmup=100000"] if self.phase == "warm-up" else []
        return [*_INFER, grid, *(_LARGE if large else _LONG), *warmup]


class Forked:
    """A command with forked ranks."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._command = Command(*command, env=env)

    def ended(self) -> bool:
        return self._command.returncode is not None or not psutil.pid_exists(self._command.pid)

    def result(self) -> tuple[int, str]:
        return self._command.wait(5), self._command.read()[1]

    def kill(self) -> None:
        self._command.kill()


class Torchrun:
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


def on_hosts(made: list[Host], command: list[str], env: dict[str, str], folder: Path) -> list[Any]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-id=faults"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={made[0].name}:29400", *command]
    return [Torchrun(host, words, env, folder) for host in made]


def caught(cell: Cell, temp: Path, jobs: Sequence[Any], made: list[Host]) -> int | None:
    """The process of a rank that is in the phase, and stopped in it; not rank 0's. None if it never was."""
    # Of forked ranks in the second run, so that something is kept; on hosts, to look takes longer than a run.
    run = "run" if cell.hosts else "run 2"
    named = {"measurement": f"measurement, {run}", "generation": f"generation, {run}", "checkpoint": "save"}
    wanted = named.get(cell.phase, cell.phase)
    outer: dict[int, int] = {}  # processes' numbers here, by their host's
    deadline = time.monotonic() + (120 if cell.hosts else 60)  # six interpreters there, each importing torch
    while time.monotonic() < deadline:
        for pid, phase in _said(cell, temp, made, outer):
            if phase.startswith(wanted):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    if any(now.startswith(wanted) for each, now in _said(cell, temp, made, outer) if each == pid):
                        return pid
                    os.kill(pid, signal.SIGCONT)
        if any(job.ended() for job in jobs):
            break
        time.sleep(0.002)
    return None


def _said(cell: Cell, temp: Path, made: list[Host], outer: dict[int, int]) -> Iterator[tuple[int, str]]:
    """Process and phase of the rank that is to be met, as it says itself."""
    if not cell.hosts:
        records = list(temp.glob(f"helix-launch-*/ranks-*/{cell.rank}.activity"))
    else:
        records = list(temp.glob("torchelastic_*/*/attempt_0/1/activity"))
    for record in records:
        with suppress(OSError, ValueError):
            pid, phase = record.read_text().split(maxsplit=1)
            if not cell.hosts:
                yield int(pid), phase
                continue
            if int(pid) not in outer:
                outer.update(_numbers(made[1]))
            if int(pid) in outer:
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


@contextmanager
def small_disk(at: Path) -> Iterator[None]:
    """A disk of 4 MB at a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", at], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


@cache
def why_no_disk() -> str:
    """Why no small disk can be made here, in one sentence; empty if it can."""
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder)):
            return ""
    except (OSError, subprocess.CalledProcessError):
        return "a disk that is full is a tmpfs, and mounting one needs root"


def environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


def befall(cell: Cell, pid: int, made: list[Host], disk: Path) -> None:
    """The fault, to a rank that is stopped."""
    if cell.fault == "no memory":
        used = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (used, used))
    elif cell.fault == "full disk":
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
    elif cell.fault == "cut off":
        made[1].cut()
    elif cell.fault != "stopped":
        os.kill(pid, signal.SIGSEGV if cell.fault == "crashed" else signal.SIGKILL)
    if cell.fault != "stopped":
        os.kill(pid, signal.SIGCONT)
