"""`python -m helix calibrate`: its options, checked without torch, and what it prints and writes."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from helix.config import environment
from helix.config.schema import ConfigError
from helix.planner.catalogue import CONF


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="of the file, which hardware= then takes: this_machine")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="what to measure; auto: GPUs if there are any",
    )
    parser.add_argument(
        "--ranks", type=int, help="the most ranks to measure collectives of; default 16, or as many as GPUs"
    )
    parser.add_argument("--quick", action="store_true", help="few points, in seconds: to try it, not to plan by")
    parser.add_argument("--force", action="store_true", help="overwrite an earlier calibration of this name")
    parser.add_argument("--folder", type=Path, default=CONF / "hardware", help="to write into; default conf/hardware")


def run(options: argparse.Namespace) -> None:
    """Measure this machine, write its file, and print what was found.

    Raises:
        ConfigError: in one sentence, before anything is launched.
    """
    from helix.calibration.points import points_of

    device, ranks = _check(options)
    from helix.calibration import file, table  # brings torch
    from helix.calibration.measure import calibrate
    from helix.study.terminal import Terminal

    path = file.check_place(options.folder, options.name, options.force)
    found = calibrate(options.name, points_of(device, ranks, options.quick))
    # As it is typed: this process's own first word is the path of the package.
    file.write(found, path, shlex.join(["python", "-m", "helix", *sys.argv[1:]]))
    terminal = Terminal()
    terminal.print(table.render(found))
    terminal.print(f"\nwritten to {path}", soft_wrap=True)


def device_of(asked: str) -> str:
    """The kind of device that --device means: of `auto` GPUs, if there are any.

    Raises:
        ConfigError: if there are none and they were asked for.
    """
    gpus = environment.gpus()
    if asked == "cuda" and not gpus:
        raise ConfigError("--device cuda needs a GPU, and this machine has none; take --device cpu")
    return "cuda" if gpus and asked != "cpu" else "cpu"


def _check(options: argparse.Namespace) -> tuple[str, int]:
    """The device to measure, and the most ranks that exchange.

    Raises:
        ConfigError: if they cannot be.
    """
    started = environment.started()
    if started is not None:
        raise ConfigError(
            f"calibrate forks its own ranks and measures one host; start it without {started.by} (the links between "
            "hosts are out of its scope: write host_link_* into its file by hand)"
        )
    gpus, device = environment.gpus(), device_of(options.device)
    most = gpus if device == "cuda" else environment.most_ranks()
    default = gpus if device == "cuda" else min(2 if options.quick else 16, most)
    ranks = default if options.ranks is None else options.ranks
    if not 1 <= ranks <= most:
        raise ConfigError(f"--ranks must be 1 to {most} on this machine's {'GPUs' if gpus else 'cores'}, not {ranks}")
    return device, ranks
