"""`python -m helix validate`: its options, checked without torch, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from helix.calibration.cases import cases
from helix.calibration.command import device_of
from helix.calibration.points import MARK
from helix.config import environment
from helix.config.hardware import HardwareConfig
from helix.config.schema import ConfigError
from helix.planner import catalogue
from helix.study.plan_command import check_file
from helix.study.report import write_whole


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hardware", metavar="HARDWARE", help="a file of conf/hardware, or the path of one")
    parser.add_argument("--ranks", type=int, default=16, help="the most ranks to launch")
    parser.add_argument("--layouts", type=int, default=6, help="of each case that take turns")
    parser.add_argument("--rounds", type=int, default=3, help="of two steps of each layout")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="what computes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw predicted against measured here")
    parser.add_argument("--write", action="store_true", help="write the median error into the file of the hardware")
    gate = parser.add_argument_group("a gate: exit with 1 unless")
    gate.add_argument("--least-tau", type=float, metavar="X", help="Kendall's tau of step times is at least X")
    gate.add_argument("--most-error", type=float, metavar="X", help="their median absolute error is at most X")
    gate.add_argument("--most-memory-error", type=float, metavar="X", help="that of memory is at most X")
    gate.add_argument(
        "--least-good", type=float, metavar="X", help="the choice is good in at least this part of cases"
    )


def run(options: argparse.Namespace) -> None:
    """Hold the planner's predictions against this machine's ranks.

    Raises:
        ConfigError: in one sentence, before anything is launched.
        RuntimeError: if a bound of the gate is missed.
    """
    path = catalogue.hardware_file(options.hardware)
    hardware = catalogue.read(path)
    for option, file in (("--json", options.json), ("--plot", options.plot)):
        if file is not None:
            check_file(option, file, picture=option == "--plot")
    device = device_of(options.device)
    _check(options, device)
    if options.write:
        _check_own(path, hardware, device)
    # The allocator would warn of every block that a profile sees freed and did not see taken.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    held = list(cases(hardware, device, options.ranks, options.layouts))
    from helix.calibration import validate_table  # brings torch
    from helix.calibration.validate import validate
    from helix.study.alternate import Rounds
    from helix.study.provenance import command, git_commit, now, versions
    from helix.study.terminal import Terminal

    found = validate(hardware.name, held, device, Rounds(options.rounds, warmup=1))
    Terminal().print(validate_table.render(found))
    if options.json is not None:
        about = {"command": command(), "commit": git_commit(), "measured_at": now(), "versions": versions()}
        options.json.write_text(json.dumps(found.as_dict() | {"about": about} | {"hardware_file": asdict(hardware)}))
    if options.plot is not None:
        from helix.figures.predictions import predictions
        from helix.figures.style import save

        save(predictions(found.as_dict()), options.plot)
    if options.write:
        write_error(path, found.error)
    if missed := found.missed(options.least_tau, options.most_error, options.most_memory_error, options.least_good):
        raise RuntimeError(f"the predictions of hardware={hardware.name} miss their bounds: {'; '.join(missed)}")


def _check(options: argparse.Namespace, device: str) -> None:
    started = environment.started()
    if started is not None:
        raise ConfigError(f"validate forks its own ranks; start it without {started.by}")
    most = environment.gpus() if device == "cuda" else environment.most_ranks()
    if not 2 <= options.ranks <= most:
        raise ConfigError(f"--ranks must be 2 to {most} on this machine, not {options.ranks}")
    if options.layouts < 2:
        raise ConfigError(
            f"--layouts must be at least 2, not {options.layouts}: a choice needs something to choose from"
        )
    if options.rounds < 2:
        raise ConfigError(f"an interval needs --rounds of at least 2, not {options.rounds}")


def _check_own(path: Path, hardware: HardwareConfig, device: str) -> None:
    """Check that a file is a calibration of the kind of devices that will be measured."""
    if not path.read_text().startswith(MARK) or hardware.ranks_take_turns != (device == "cpu"):
        raise ConfigError(
            f"--write puts this machine's error into {path}, which is no calibration of it; make one by "
            "python -m helix calibrate --name this_machine, or leave --write out"
        )


def write_error(path: Path, error: float) -> None:
    """Put the median error of times into a hardware file, whose other lines and comments stay."""
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("time_error_share:")]
    place = next((number for number, line in enumerate(lines) if line.startswith("time_error_share:")), len(kept))
    kept.insert(
        place, f"time_error_share: {error:.3f} # median of python -m helix validate, on the machine of this file"
    )
    write_whole("\n".join(kept) + "\n", path)
