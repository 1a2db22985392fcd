"""The fault matrix: in each phase of a job a rank is killed, crashed, stopped, cut off, starved; how does the job end?

    python -m tests.faults                       all of it, as a table; five minutes on two cores
    python -m tests.faults --phases save --faults killed stopped --json out.json

Faults come from outside: a rank says its phase (`helix.flight.activity`), is stopped in it, and once it is seen to be
in it still, gets its fault: a signal, a limit (`prlimit`), or its host's cable drawn. Nothing in the library knows it.
Jobs are forked ranks of one command, or torchrun's on two hosts made of network namespaces (tests/hosts.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from commands import _server
from fault_jobs import (
    FORKED,
    HOSTS,
    PHASES,
    Cell,
    Forked,
    befall,
    caught,
    environment,
    on_hosts,
    small_disk,
    why_no_disk,
)
from hosts import Host, hosts, why_not
from texts import write_folder

from helix.study.provenance import command, git_commit, machine, now, versions
from helix.study.report import write_whole
from helix.study.runs import DamagedRun, load_runs


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Args:
        seconds: from the fault to the end of the last process.
        said: lines of standard error that are a message; of all hosts.
        others: lines of standard error that are none; of two hosts mostly torchrun's own.
        records: of history.jsonl.
        wandb: state of the W&B run as `load_runs` has it; None if there was none yet.
        left: processes and temporary files that are still there.
    """

    cell: Cell
    seconds: float
    exit_codes: tuple[int, ...]
    said: tuple[str, ...]
    others: tuple[str, ...]
    records: int
    failed: dict[str, Any] | None
    wandb: str | None
    left: tuple[str, ...]
    stuck: bool = False
    missed: bool = False

    @property
    def fault(self) -> str:
        """What is not as it should be; empty if all is."""
        if self.missed:
            return "no rank was met in this phase"
        names = bool(self.said) and all(re.search(r"(rank \d+) \(host \S+\) .* during ", each) for each in self.said)
        done = self.cell.phase == "save" and self.wandb == "finished"  # rank 0, which may be ahead
        said_too = all("has lost W&B's process" in each for each in self.others)  # ours, of a full disk
        quiet = said_too or self.cell.hosts or self.cell.fault in ("crashed", "no memory")
        killed = (-9, 137) if self.cell.fault == "cut off" else ()  # torchrun, on the host that was cut off
        checks = {
            f"ended after {self.seconds:.1f} s": not self.stuck and self.seconds <= self.cell.limit_s,
            f"exit codes {self.exit_codes}": set(self.exit_codes) <= {1, *killed},
            f"{len(self.said)} messages": len(self.said) in ((1, 2) if self.cell.hosts else (1,)),
            "no rank, host and phase": names,
            # torchrun's, and what the C library prints of a crash, or when even its threads find no memory
            f"{len(self.others)} other lines": quiet,
            f"left: {', '.join(self.left)}": not self.left,
            "no failed.json": self.failed is not None,
            f"W&B run {self.wandb}": self.wandb in ("failed", None) or self.cell.hosts or done,
        }
        return "; ".join(said for said, fine in checks.items() if not fine)


def spoil(cell: Cell, folder: Path, models: Path) -> Ending:
    """Run a job, have its fault happen, and see how it ends."""
    temp, disk = folder / "tmp", folder / "disk"
    out = disk / "out"
    temp.mkdir(parents=True)
    disk.mkdir()
    env = {"TMPDIR": str(temp), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [each.format(models=models) for each in cell.command] + [f"hydra.run.dir={out}"]
    with ExitStack() as stack:
        if cell.fault == "full disk":
            stack.enter_context(small_disk(disk))
        made: list[Host] = list(stack.enter_context(hosts(2))) if cell.hosts else []
        jobs = on_hosts(made, command, env, folder) if made else [Forked(command, env)]
        try:
            rank = caught(cell, temp, jobs, made)
            if rank is not None:
                befall(cell, rank, made, disk)
            return replace(_watched(cell, jobs, temp, out), missed=rank is None)
        finally:
            for job in jobs:
                job.kill()


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
        tuple(line for line in lines if line not in said),
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
            if f"TMPDIR={temp}" in environment(process.pid) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.name()} {process.pid}")
    return found + [each.name for each in temp.iterdir() if not each.name.startswith("torchelastic_")]


def _state(out: Path) -> str | None:
    if not any(out.glob("wandb/*run-*/run-*.wandb")):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedRun)  # of rank 0, which was killed
        return str([None, *load_runs(out).state][-1])


def cells(phases: Sequence[str], faults: Sequence[str]) -> list[Cell]:
    """All cells of the matrix that are asked for, and can be made here; says on stderr which cannot."""
    forked = [Cell(phase, fault) for phase in phases for fault in FORKED if fault in faults]
    # Where a rank writes nothing, it does not miss room on the disk.
    forked = [cell for cell in forked if cell.fault != "full disk" or cell.phase in ("save", "checkpoint")]
    forked = [cell for cell in forked if cell != Cell("save", "no memory")]  # it needs none any more
    several = [Cell(phase, fault, hosts=True) for phase in phases for fault in HOSTS if fault in faults]
    several = [cell for cell in several if cell.phase in ("load", "measurement", "training")]
    found = forked + several
    for cannot, why in (("full disk", why_no_disk()), ("2 hosts", why_not())):
        without = [cell for cell in found if cannot not in (cell.fault, "2 hosts" if cell.hosts else "")]
        if why and len(without) < len(found):
            print(f"without {len(found) - len(without)} cells of {cannot}: {why}", file=sys.stderr)
            found = without
    return found


def run(asked: Sequence[Cell], folder: Path, at_once: int = 4, told: Callable[[Ending], None] = print) -> list[Ending]:
    """All endings, in order; `told` hears of each as it comes."""
    models = folder / "models"
    write_folder(models)
    _server()  # one for all threads

    def one(numbered: tuple[int, Cell]) -> Ending:
        number, cell = numbered
        ending = spoil(cell, folder / str(number), models)
        told(ending)
        return ending

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, enumerate(asked)))


def table(endings: Sequence[Ending]) -> Table:
    """A row for each cell; what is wrong in a column of its own, if anything is."""
    shown = Table(title="A rank's faults, and how its job ends", title_justify="left")
    for name in ("phase", "fault", "ranks"):
        shown.add_column(name, no_wrap=True)
    for name in ("s", "exit", "kept"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("said")
    if any(each.fault for each in endings):
        shown.add_column("wrong", style="red")
    for each in endings:
        said = [re.sub(r"^.*?error: |; the other ranks were stopped.*$", "", line) for line in each.said]
        shown.add_row(
            each.cell.phase, each.cell.fault, "2 hosts" if each.cell.hosts else "forked", f"{each.seconds:.1f}",
            ",".join(map(str, each.exit_codes)), str(each.records), "\n".join(said),
            *([each.fault] if any(other.fault for other in endings) else []),
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--faults", nargs="+", default=(*FORKED, "cut off"), choices=(*FORKED, "cut off"))
    parser.add_argument("--ranks", default="both", choices=("forked", "hosts", "both"), help="on how many hosts")
    parser.add_argument("--at-once", type=int, default=4, help="jobs at a time")
    parser.add_argument("--json", type=Path, help="where all endings are written, each as it comes")
    asked = parser.parse_args()
    wanted = {"forked": (False,), "hosts": (True,), "both": (False, True)}[asked.ranks]
    some = [cell for cell in cells(asked.phases, asked.faults) if cell.hosts in wanted]
    provenance = {"started_at": now(), "command": command(), "commit": git_commit(), "machine": machine()}
    found: list[dict[str, Any]] = []

    def told(each: Ending) -> None:
        where = "2 hosts" if each.cell.hosts else "forked"
        how = f"{each.seconds:.1f} s, {each.fault or 'as it should'}"
        print(f"{each.cell.phase}, {each.cell.fault}, {where}: {how}", file=sys.stderr, flush=True)
        found.append(asdict(each) | {"wrong": each.fault, "others": len(each.others)})
        if asked.json is not None:
            write_whole(
                json.dumps(provenance | {"versions": versions(), "endings": found}, indent=1) + "\n", asked.json
            )

    with tempfile.TemporaryDirectory(prefix="helix-faults-") as folder:
        endings = run(some, Path(folder), asked.at_once, told)
    Console(width=120).print(table(endings))
    raise SystemExit(any(each.fault for each in endings))


if __name__ == "__main__":
    main()
