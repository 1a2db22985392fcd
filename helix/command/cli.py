"""Commands: composing their configuration, refusing what cannot run, and the ways in which they end.

Every job of a command line is composed and checked before Hydra is given the first one, since Hydra makes a
job's folder before it calls the job: a refused command leaves nothing behind. In a sweep a combination that
does not fit (`PartitionError`, `Misfit`) is passed over with its reason; any other error refuses all of it.

Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from helix.command.compose import UNREADABLE, Composed, compose_jobs, prepare
from helix.command.explain import FORM, explain
from helix.command.job import Agree, Check, Collect, Command, Task, check_agreed, hand_to_hydra, settle, stop, tell
from helix.command.multirun import run_sweep
from helix.command.prompt import quote_prompts
from helix.command.sentences import told
from helix.config import environment
from helix.config.check import check as check_infer
from helix.config.schema import ConfigError, InferConfig, PartitionError

# What composing can raise. Configs are data, so none of these is a fault of the program; ValueError, TypeError,
# AttributeError, RecursionError and OSError are Hydra's own for an override that is no text, and for a file that it
# cannot read.
REFUSALS = (HydraException, *UNREADABLE, OSError)
_COMPLETION = r"(install|uninstall|query)=(bash|zsh|fish)"


def command(
    name: str,
    conf: Path,
    collect: Collect | None = None,
    agree: Agree | None = None,
    schema: type = InferConfig,
    check: Check = check_infer,
) -> Callable[[Task], Callable[[], None]]:
    """Turn `task(settings, run_dir)` into a command with Hydra's command line; see `Command` for the arguments.

    Of the ranks that torchrun or SLURM started only rank 0 has a folder: the others are told the path that
    theirs would have had, which is not made.
    """

    def decorate(task: Task) -> Callable[[], None]:
        def main() -> None:
            try:
                _main(Command(name, conf, task, collect, agree, schema, check))
            except OSError as error:
                stop(told(error), code=2)
            except KeyboardInterrupt:
                stop("interrupted", code=130)

        return main

    return decorate


def _main(this: Command) -> None:
    if hasattr(this.schema, "prompt"):
        sys.argv[1:] = quote_prompts(sys.argv[1:])  # where Hydra's own command line reads them, too
    args = _arguments()
    prepare(args.overrides, this.name, this.schema)
    composed = Composed(None) if _is_about_hydra(args) else _compose(this, args)
    if not _runs(args):
        _show(this, args)
    elif composed.sweep is not None:
        run_sweep(this, composed, composed.sweep)
    else:
        _run(this, *(composed.jobs or ()))


def _show(this: Command, args: argparse.Namespace) -> None:
    """What Hydra shows in place of a run."""
    try:
        hand_to_hydra(this, lambda cfg: None)
    except REFUSALS as error:  # of Hydra's own help, which knows no key of the command's
        stop(explain(error, this.schema, this.conf, args.overrides), code=2)


def _run(this: Command, cfg: DictConfig) -> None:
    """The command's one job."""
    one, misfit = settle(this, cfg, folder="hydra.run.dir")
    if misfit is not None:
        stop(misfit, code=2)
    check_agreed(this, [one])
    tell(one)
    if not environment.speaks():
        this.task(one, Path(cfg.hydra.run.dir).absolute())
        return
    hand_to_hydra(this, lambda _: this.task(one, Path(HydraConfig.get().runtime.output_dir)))


def _arguments() -> argparse.Namespace:
    """Hydra's own arguments, their errors in one line."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        stop(f"{message}; {FORM}, and flags such as -m before them", code=2)

    parser.error = error  # type: ignore[method-assign]
    args = parser.parse_args()
    flags = ("run", "multirun", "cfg", "info", "shell_completion")
    given = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag)]
    if len(given) > 1:
        stop(f"{' and '.join(given)} cannot be given together; choose one", code=2)
    if args.config_name == "":
        stop("--config-name takes a config's name, without .yaml; the command's own is used without it", code=2)
    if args.experimental_rerun is not None:
        stop("--experimental-rerun runs what is in a pickle; give the words of that job's .hydra/overrides.yaml", 2)
    if args.shell_completion and not any(re.fullmatch(_COMPLETION, word) for word in args.overrides):
        stop("--shell-completion takes one of: install=bash, uninstall=bash, query=bash (or zsh, fish)", code=2)
    if args.resolve and not (args.cfg or args.help):
        stop("--resolve belongs to --cfg or --help; add --cfg job", code=2)
    return args


def _is_about_hydra(args: argparse.Namespace) -> bool:
    """Whether the command is not about a composed job at all."""
    return bool(args.hydra_help or args.shell_completion)


def _runs(args: argparse.Namespace) -> bool:
    return not (args.help or args.cfg or args.info or _is_about_hydra(args))


def _compose(this: Command, args: argparse.Namespace) -> Composed:
    try:
        return compose_jobs(this.name, this.conf, args)
    except (ConfigError, PartitionError) as error:
        stop(str(error), code=2)
    except REFUSALS as error:
        stop(explain(error, this.schema, this.conf, args.overrides), code=2)


__all__ = ["command", "stop"]
