"""What a command's single run and its sweeps share: the command, one job's settings, the ways to end."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from helix.command.choose import choose
from helix.command.compose import VERSION_BASE, check_folder, typed
from helix.command.explain import explain
from helix.command.sweep import SweepJob
from helix.config import environment
from helix.config.check import check
from helix.config.methods import to_name
from helix.config.parallel import AUTO
from helix.config.schema import ConfigError, InferConfig, Misfit, PartitionError, Settings
from helix.config.secrets import SecretError, refuse_secrets
from helix.config.train_schema import TrainConfig
from helix.planner.chosen import told

# Both are given the command's own configuration: an instance of `Command.schema`.
Task = Callable[[Any, Path], None]
Check = Callable[[Any], None]
Collect = Callable[[Path, Sequence[SweepJob]], None]
Agree = Callable[[list[str]], list[str]]


# torchrun stops all others a tenth of a second after the first has ended: the one that speaks should be that.
_GRACE_S = 1.0


class Stop(SystemExit):
    """The end of a command, whose reason has been said."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code)
        self.reason = reason


@dataclass(frozen=True)
class Command:
    """A command, and what its sweeps need of the rooms above this one, which know torch and reports.

    Args:
        name: of the primary config, and of the job.
        conf: absolute path of the folder that holds it.
        task: what one job does.
        collect: called with a sweep's folder and jobs when they have ended, to make its table.
        agree: gives every rank that a launcher started rank 0's words. They must run the same jobs, and could find
            different ones: a report that rank 0 writes meanwhile, or another amount of free memory.
        schema: dataclass of its configuration (`Settings`), known to conf/{name}.yaml as {name}_schema.
        check: refuses what a configuration has wrong, before anything is launched.
    """

    name: str
    conf: Path
    task: Task
    collect: Collect | None = None
    agree: Agree | None = None
    schema: type = InferConfig
    check: Check = check


def stop(reason: str, code: int) -> NoReturn:
    """End the command with one sentence on stderr, which one rank says for all."""
    reason = " ".join(reason.split())
    environment.tell_launcher(reason)
    if environment.speaks():
        print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_GRACE_S)
    raise Stop(code, reason)


def tell(one: Settings) -> None:
    """Say on stderr, before a job runs, what its layout was chosen for and why, if it was chosen."""
    if one.chosen is None or not environment.speaks():
        return
    lines = told(one.chosen).splitlines()
    if sys.stderr.isatty():  # which would break words
        lines = [textwrap.fill(line, shutil.get_terminal_size().columns) for line in lines]
    print("\n".join(lines), file=sys.stderr, flush=True)


def check_chosen(one: Settings) -> None:
    """Check that a layout was chosen by figures of the devices that will run it.

    Raises:
        ConfigError: if GPUs' figures decided, and cores are to compute.
    """
    assert isinstance(one, InferConfig | TrainConfig), one
    hardware, ranks = one.hardware, one.parallel.ranks
    traces = isinstance(one, InferConfig) and one.dry_run
    if one.chosen is None or traces or hardware.name == AUTO or hardware.ranks_take_turns:
        return
    if environment.resolve_device(one.device, local := environment.local_ranks(ranks)) == "cuda":
        return
    instead = "dry_run=true" if isinstance(one, InferConfig) else "python -m helix plan mode=train"
    raise ConfigError(
        f"parallel=auto would choose by hardware={hardware.name}, and device={one.device} computes {local} ranks on "
        f"this machine's cores (it has {environment.gpus()} GPUs); take {instead} for a prediction alone, or "
        f"hardware={AUTO} for this machine"
    )


def check_agreed(this: Command, jobs: Sequence[Settings]) -> None:
    """End the command if a rank that a launcher started chose another layout than rank 0 on its host."""
    launcher = environment.started()
    if launcher is None or this.agree is None:
        return
    if all(one.chosen is None and one.parallel.method != AUTO for one in jobs):
        return
    own = [to_name(one.parallel) for one in jobs]
    first = this.agree(own)
    if own != first:
        which = next(number for number, pair in enumerate(zip(own, first, strict=True)) if pair[0] != pair[1])
        said = (
            f"parallel=auto comes to {first[which]} on rank 0's host and to {own[which]} on that of rank "
            f"{launcher.rank}, which has other cores or memory; name the layout, or give hardware="
        )
        print(f"{Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)
        environment.tell_launcher(said)
        raise Stop(2, said)


def hand_to_hydra(this: Command, job: Callable[[DictConfig], float | None]) -> None:
    """Have Hydra's own command line call `job`, once or for each job of a sweep."""
    hydra.main(version_base=VERSION_BASE, config_path=str(this.conf), config_name=this.name)(job)()


def settle(this: Command, cfg: DictConfig, folder: str | None = None, where: str = "") -> tuple[Any, str | None]:
    """A job's settings, and why they cannot run if they do not fit together, or not on this machine.

    Any other fault of theirs ends the command.

    Args:
        folder: the key of one that is still to be made.
        where: what an error begins with.
    """
    misfit = None
    try:
        one: Settings = typed(cfg, this.conf)
        refuse_secrets({"the command line": sys.argv[1:], **asdict(one)})
        try:
            one = choose(one)
            check_chosen(one)
            this.check(one)
        except (PartitionError, Misfit) as error:
            misfit = str(error)
        if folder is not None:  # whose name may be made of the method's, which is legal by now
            refuse_secrets({folder: str(OmegaConf.select(cfg, folder))})
            check_folder(cfg, folder)
    except SecretError as error:
        stop(str(error), code=2)  # `where` may hold it, too
    except ConfigError as error:
        stop(where + str(error), code=2)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        stop(explain(error, this.schema, this.conf, []), code=2)
    return one, misfit
