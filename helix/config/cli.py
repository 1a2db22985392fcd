"""Commands: composing their configuration, refusing what cannot run, and the ways in which they end.

Every job of a command line is composed and checked before Hydra is given the first one, since Hydra makes a
job's folder before it calls the job: a refused command leaves nothing behind, and a sweep with an illegal
combination starts none of its jobs.

Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
import yaml  # type: ignore[import-untyped]
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from helix.config import environment
from helix.config.check import check
from helix.config.compose import VERSION_BASE, check_folder, compose_jobs, prepare, typed
from helix.config.explain import FORM, explain
from helix.config.schema import ConfigError, InferConfig, PartitionError

Task = Callable[[InferConfig, Path], None]
# What composing can raise. Configs are data, so none of these is a fault of the program; ValueError and OSError
# are Hydra's own for an override that is no text and for a file that it cannot read.
REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)


def command(name: str, conf: Path) -> Callable[[Task], Callable[[], None]]:
    """Turn `task(settings, run_dir)` into a command with Hydra's command line.

    Of the ranks that torchrun or SLURM started only rank 0 has a folder: the others are told the path that
    theirs would have had, which is not made.

    Args:
        name: of the primary config, and of the job.
        conf: absolute path of the folder that holds it.
    """

    def decorate(task: Task) -> Callable[[], None]:
        def main() -> None:
            try:
                _main(name, conf, task)
            except KeyboardInterrupt:
                stop("interrupted", code=130)

        return main

    return decorate


def stop(reason: str, code: int) -> NoReturn:
    """End the command with one sentence on stderr, which one rank says for all."""
    if environment.speaks():
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(reason.split())}", file=sys.stderr)
    raise SystemExit(code)


def _main(name: str, conf: Path, task: Task) -> None:
    prepare()
    args = _arguments()
    jobs = [] if _is_about_hydra(args) else _compose(name, conf, args)
    if _runs(args):
        settings = _check(jobs, conf, folder="hydra.sweep.dir" if args.multirun else "hydra.run.dir")
        if not environment.speaks():
            for one, cfg in zip(settings, jobs, strict=True):
                task(one, Path(cfg.hydra.run.dir).absolute())
            return

    @hydra.main(version_base=VERSION_BASE, config_path=str(conf), config_name=name)
    def job(cfg: DictConfig) -> None:
        # Checked again, for the sweepers whose jobs were not known above.
        (one,) = _check([cfg], conf)
        task(one, Path(HydraConfig.get().runtime.output_dir))

    job()


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
    if args.resolve and not (args.cfg or args.help):
        stop("--resolve belongs to --cfg or --help; add --cfg job", code=2)
    return args


def _is_about_hydra(args: argparse.Namespace) -> bool:
    """Whether the command is not about a composed job at all."""
    return bool(args.hydra_help or args.shell_completion or args.experimental_rerun)


def _runs(args: argparse.Namespace) -> bool:
    return not (args.help or args.cfg or args.info or _is_about_hydra(args))


def _compose(name: str, conf: Path, args: argparse.Namespace) -> list[DictConfig]:
    try:
        return compose_jobs(name, conf, args)
    except (ConfigError, PartitionError) as error:
        stop(str(error), code=2)
    except REFUSALS as error:
        stop(explain(error, InferConfig, conf, args.overrides), code=2)


def _check(jobs: list[DictConfig], conf: Path, folder: str | None = None) -> list[InferConfig]:
    """Each job's settings, all of which can run; `folder` is the key of one that is still to be made."""
    settings = []
    for number, cfg in enumerate(jobs):
        try:
            one = typed(cfg, conf)
            check(one)
            if folder is not None:
                check_folder(cfg, folder)
        except (ConfigError, PartitionError) as error:
            which = f"job {number} ({' '.join(cfg.hydra.overrides.task)}): " if len(jobs) > 1 else ""
            stop(which + str(error), code=2)
        except OmegaConfBaseException as error:  # an interpolation that leads nowhere
            stop(explain(error, InferConfig, conf, []), code=2)
        settings.append(one)
    return settings
