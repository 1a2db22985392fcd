"""Thousands of generated command lines, each in a process of its own: python tests/fuzz.py --examples 2000 --seed 0

Each either runs, or ends soon with one sentence and leaves nothing behind: no traceback, no signal, no rank, no file.
It is first run as far as it gets without torch, in a fork of this process, where nearly every refusal is; what gets
further begins again, in a fork of one that has torch. A log keeps what was found, so that the same command goes on
where it was stopped; --part 1/3 takes every third piece.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from commands import Command
from fuzz_helix import lines
from fuzz_light import BEGINS, IMPORTED, Light
from fuzz_lines import Line
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture.engine import ConjectureRunner

PIECE = 50  # lines that have one seed
LIMIT_S = 90  # of one command, beside others on the same cores; the slowest are listed
CLEAN = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", "WANDB_API_KEY")
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}


@dataclass(frozen=True)
class Ended:
    """How a command line ended.

    Args:
        code: its exit code; None if it had to be killed.
        fault: what it must not do, and did; None for a run, or a refusal in one sentence.
    """

    name: str
    shown: str
    code: int | None
    seconds: float
    sentence: str
    fault: str | None


def generated(number: int, count: int = PIECE) -> list[Line]:
    """The lines of one piece, the same on every machine."""
    for name in IMPORTED:
        importlib.import_module(name)
    found: list[Line] = []

    @seed(number)
    @settings(
        max_examples=2 * count,  # of which some are alike
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(lines())
    def draw(one: Line) -> None:
        if one not in found:
            found.append(one)

    mutate = ConjectureRunner.generate_mutations_from
    ConjectureRunner.generate_mutations_from = lambda *_: None  # type: ignore[method-assign]  # half would be alike
    try:
        draw()
    finally:
        ConjectureRunner.generate_mutations_from = mutate  # type: ignore[method-assign]
    return found[:count]


def run(line: Line, limit_s: float = LIMIT_S, checks_only: bool = False) -> Ended:
    """A line as far as it goes, or until nothing is wrong with it."""
    first = _run(Light, line, limit_s)
    return first if first.code != BEGINS or checks_only else _run(Command, line, limit_s)


def _run(kind: type[Light] | type[Command], line: Line, limit_s: float) -> Ended:
    """A line in a folder of its own, with a folder for temporary files of its own."""
    with tempfile.TemporaryDirectory(prefix="helix-fuzz-", ignore_cleanup_errors=True) as above:
        home, temporary = Path(above) / "in" / "here", Path(above) / "tmp"
        home.mkdir(parents=True)
        temporary.mkdir()
        for name, content in line.files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(content)
        before = _contents(Path(above))
        env = QUIET | {"TMPDIR": str(temporary), "NETRC": str(home / "no-netrc")} | line.env
        began = time.monotonic()
        command = kind(*line.command, *line.words, cwd=home, env=env)
        code: int | None
        try:
            code = command.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - began
        if code == BEGINS:
            return Ended(line.name, "", code, seconds, "", None)
        left = _left(command.pid, home)
        for process in left:
            process.kill()
        out, err = _said(command)
        fault = "does not end" if code is None else _fault(line, code, out, err)
        if fault is None and left:
            fault = f"leaves processes {[process.pid for process in left]}"
        new = sorted(_contents(Path(above)) - before)
        if fault is None and (code == 2 or any(name.startswith("tmp/") for name in new)) and new:
            fault = f"leaves {new}"
        return Ended(line.name, _shown(line), code, seconds, _sentence(err) if code == 2 else err[-3000:], fault)


def _said(command: Light | Command) -> tuple[str, str]:
    try:
        command.wait(10)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait(10)
    return command.read()


def _contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _left(pid: int, home: Path) -> list[psutil.Process]:
    """Processes of the command's session or in its folder, which have had a second to end."""
    for _ in range(20):
        left = []
        for process in psutil.process_iter():
            try:
                own = os.getsid(process.pid) == pid or process.cwd().startswith(str(home))
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
            except (psutil.Error, OSError):
                continue
        if not left:
            break
        time.sleep(0.1)
    return left


def _fault(line: Line, code: int, out: str, err: str) -> str | None:
    """What is wrong with how a command ended by itself."""
    if "Traceback (most recent call last)" in out + err:
        return "a traceback"
    program = "python -m helix" if line.command[0] == "-m" else Path(line.command[0]).name
    said = [one for one in err.splitlines() if one.startswith(f"{program}: error: ")]
    if code == 0:
        return None
    if code not in (1, 2):
        return f"exit code {code}"
    if line.env.get("RANK", line.env.get("SLURM_PROCID", "0")) != "0":
        return None  # another rank speaks
    if code == 1:
        return None if said or line.name == "claims" else "exit code 1 and no sentence"
    if line.words[:2] == ("checkpoint", "verify"):
        return None if said else "no sentence"
    if len(said) != 1 or err.count("\n") != 1:
        return f"{len(said)} sentences in {err.count(chr(10))} lines"
    if out:
        return "speaks on stdout, too"
    return None if len(err) < 4000 else f"a sentence of {len(err)} letters"


def _sentence(err: str) -> str:
    return err.partition(": error: ")[2].strip() or err


def _shown(line: Line) -> str:
    files = {name: content for name, content in line.files.items() if name.startswith("mine") or name == "broken.yaml"}
    return (
        repr((*line.command[:1], *line.words))
        + (f" env {line.env}" if line.env else "")
        + (f" files {files}" if any("mine" in word or "broken" in word for word in line.words) else "")
    )


def _kind(sentence: str) -> str:
    """A sentence without its names and figures."""
    plain = re.sub(r"'.*?'|\"|[\w.]*[=/]\S*|-?\d\S*", "_", sentence)
    return " ".join(plain.split()[:7])


def pieces(examples: int, number: int, part: str) -> Iterator[tuple[int, int]]:
    """Seeds and sizes of this part's pieces."""
    one, of = map(int, part.split("/"))
    for piece in range(-(-examples // PIECE)):
        if piece % of == one - 1:
            yield number * 100_000 + piece, min(PIECE, examples - piece * PIECE)


def summary(found: list[Ended]) -> str:
    """Counts, the slowest, kinds of sentences, and every line that ended wrongly."""
    by = Counter(
        (one.name, {0: "ran", 1: "failed", 2: "refused", BEGINS: "accepted"}.get(one.code or 0, "?")) for one in found
    )
    kinds = Counter(_kind(one.sentence) for one in found if one.code == 2 and one.fault is None)
    faults = [one for one in found if one.fault is not None]
    told = [f"{len(found)} command lines, {len(faults)} of them ended wrongly, {len(kinds)} kinds of sentences"]
    told += [f"  {count:5} {name} {what}" for (name, what), count in sorted(by.items())]
    told += ["slowest:"] + [
        f"  {one.seconds:6.1f} s  {one.shown[:150]}" for one in sorted(found, key=lambda one: -one.seconds)[:8]
    ]
    told += ["sentences:"] + [f"  {count:5} {kind}" for kind, count in kinds.most_common(40)]
    told += ["failed while running:"] + [
        f"  {one.shown}\n      {one.sentence[-300:]}" for one in found if one.code == 1 and one.fault is None
    ]
    told += ["ended wrongly:"] + [f"  {one.fault}: {one.shown}\n      {one.sentence[-1500:]}" for one in faults]
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="which of how many, that run beside each other")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no other line after so many")
    parser.add_argument("--log", type=Path, help="a line of JSON for each; what is there is not repeated")
    parser.add_argument("--checks-only", action="store_true", help="begin no line that nothing is wrong with")
    parser.add_argument("--only", help="lines of one command")
    options = parser.parse_args()
    for variable in CLEAN:
        os.environ.pop(variable, None)
    log = options.log or Path(tempfile.mkstemp(suffix=".jsonl")[1])
    found = [Ended(**json.loads(one)) for one in log.read_text().splitlines()] if log.exists() else []
    done, end = len(found), time.monotonic() + options.seconds
    with log.open("a") as file:
        for number, count in pieces(options.examples, options.seed, options.part):
            for line in generated(number, count):
                if options.only not in (None, line.name):
                    continue
                if done:
                    done -= 1
                    continue
                if time.monotonic() > end:
                    break
                found.append(run(line, checks_only=options.checks_only))
                file.write(json.dumps(asdict(found[-1])) + "\n")
                file.flush()
                if found[-1].fault:
                    print(f"{found[-1].fault}: {found[-1].shown}\n    {found[-1].sentence[-600:]}", flush=True)
            print(f"piece {number}: {len(found)} so far", file=sys.stderr, flush=True)
            if time.monotonic() > end:
                break
    print(summary(found))
    sys.exit(any(one.fault for one in found))


if __name__ == "__main__":
    main()
