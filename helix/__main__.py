"""`python -m helix COMMAND`: each command's options and what it does are in a module of its own.

Options are checked without torch. Exit codes as in `helix.command.cli`: 0 done, 1 failed while running, 2 wrong input,
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn, Protocol

from helix.calibration import command as calibrate_command
from helix.calibration import validate_command
from helix.certify import command as verify_command
from helix.checkpoint import command as checkpoint_command
from helix.checkpoint.content import CheckpointError
from helix.claims import command as claims_command
from helix.command.sentences import complain, told
from helix.config.environment import tell_launcher
from helix.config.schema import ConfigError
from helix.config.secrets import refuse_secrets
from helix.partition.grid import PartitionError
from helix.pretrained import gguf_command
from helix.study import bench_command, flight_command, plan_command


class _Command(Protocol):
    """A command's module; it imports torch when it runs, not before."""

    def add_options(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> None: ...


# By their names on the command line, with what --help says of them.
_COMMANDS: dict[str, tuple[_Command, str]] = {
    "calibrate": (calibrate_command, "measure this machine, and write a file that hardware= takes"),
    "validate": (validate_command, "hold a machine's file against its own ranks: times, memory, bytes, choices"),
    "verify": (verify_command, "hold a grid's schedules against one device on the ranks at hand: exact, or not"),
    "bench": (bench_command, "measure alternatives side by side, alternating in one launch"),
    "checkpoint": (checkpoint_command, "whole weights to and from one safetensors file"),
    "plan": (plan_command, "choose a layout for a machine, with its cost and why"),
    "claims": (claims_command, "what holds of the papers: every claim, its verdict and what shows it"),
    "flight": (flight_command, "compare the flight records of a run that failed: where its ranks part"),
    "gguf": (gguf_command, "make a GGUF file a Hugging Face folder, which model.path= takes"),
}


class _Parser(argparse.ArgumentParser):
    """Errors of one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        _stop(f"{message} (--help lists the options)", code=2)


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    command, _ = _COMMANDS[options.command]
    try:
        refuse_secrets({"the command line": sys.argv[1:] if argv is None else argv})
        command.run(options)
    except (PartitionError, ConfigError, CheckpointError) as error:
        _stop(str(error), code=2)
    except OSError as error:
        _stop(told(error), code=2)
    except KeyboardInterrupt:
        _stop("interrupted", code=130)
    except RuntimeError as error:
        _stop(str(error), code=1)


def _stop(reason: str, code: int) -> NoReturn:
    complain(reason)
    tell_launcher(reason)
    raise SystemExit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m helix", description="Helix's commands beside infer.py and train.py.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(_COMMANDS)}}}")
    for name, (command, text) in _COMMANDS.items():
        command.add_options(commands.add_parser(name, help=text))
    return parser


if __name__ == "__main__":
    main()
