"""Composing the jobs of a command line, all of them before the first one starts."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from helix.command.choose import choose, devices_of
from helix.command.explain import missing_value, unknown_key
from helix.command.sweep import SweepJob, folder_name
from helix.config.folder import model_dim
from helix.config.methods import to_name
from helix.config.parallel import AUTO
from helix.config.schema import ConfigError, InferConfig, ParallelConfig, PartitionError, Settings, register

# What reading a stranger's YAML can raise.
UNREADABLE = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError)
_ROOM_BYTES = 1 << 20  # for a job's configuration and report
VERSION_BASE = "1.3"  # of Hydra's defaults; among them, that a job does not change the working directory


@dataclass(frozen=True)
class Composed:
    """What a command line asks for.

    Args:
        jobs: as Hydra will compose them, `hydra` node included; None for a sweep by another sweeper than Hydra's
            own, which may choose the next job by the last.
        sweep: the config of the sweep itself, with one of the values of what is swept; None if there is one job.
    """

    jobs: list[DictConfig] | None
    sweep: DictConfig | None = None


def prepare(overrides: Sequence[str] = (), name: str = "infer", schema: type = InferConfig) -> None:
    """Make known to Hydra what conf/ refers to: the command's schema, and the resolvers that name folders.

    Args:
        overrides: the command line's, after which a sweep's folder is named. A job's config holds its own alone,
            and has to come to the same name.
        name: the command's; conf/{name}.yaml knows the schema as {name}_schema.
        schema: dataclass of the command's configuration.
    """
    register(f"{name}_schema", schema)
    OmegaConf.register_new_resolver("helix_method", _method_name, replace=True)
    OmegaConf.register_new_resolver("helix_ranks", _ranks, replace=True)
    OmegaConf.register_new_resolver("helix_pretrained", model_dim, replace=True)
    folder = folder_name(overrides)
    OmegaConf.register_new_resolver("helix_sweep", lambda: folder, replace=True)


def compose_jobs(name: str, conf: Path, args: argparse.Namespace) -> Composed:
    """Compose every job of a command line.

    Args:
        name: of the primary config.
        conf: folder that holds it.
        args: Hydra's own, parsed.

    Raises:
        ConfigError: if a folder that was named is not there.
        Exception: whatever Hydra and OmegaConf raise; see `helix.command.explain`.
    """
    if args.config_path is not None and not Path(args.config_path).is_absolute():
        raise ConfigError(f"--config-path takes an absolute path, not {args.config_path}")
    overrides = list(args.overrides)
    for flag in ("config_path", "config_dir"):
        folder = getattr(args, flag)
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"--{flag.replace('_', '-')}={folder} is not a folder; conf/ is used without it")
    if args.config_dir is not None:
        overrides.append(f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']")
    name = args.config_name or name
    with initialize_config_dir(str(args.config_path or conf), version_base=VERSION_BASE, job_name=name):
        hydra = cast(Any, GlobalHydra.instance().hydra)
        if not args.multirun and hydra.get_mode(name, overrides) != RunMode.MULTIRUN:
            return Composed([compose(name, overrides, return_hydra_config=True)])
        sweep = hydra.compose_config(config_name=name, overrides=overrides, run_mode=RunMode.MULTIRUN)
        if sweep.hydra.sweeper._target_ != BasicSweeperConf._target_:
            return Composed(None, sweep)
        jobs = [compose(name, job, return_hydra_config=True) for job in _expand(hydra, sweep.hydra)]
    for number, cfg in enumerate(jobs):
        with open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)  # as Hydra's own launcher does
    return Composed(jobs, sweep)


def _expand(hydra: Any, sweep: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep, by Hydra's own expansion."""
    params = [f"{key}={value}" for key, value in (sweep.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    parsed = parser.parse_overrides([*params, *sweep.overrides.task])
    return [[*sweep.overrides.hydra, *job] for job in BasicSweeper.split_arguments(parsed, None)[0]]


def sweep_folder(cfg: DictConfig) -> Path:
    """The folder of a sweep, by the config of the sweep or of one of its jobs."""
    return Path(str(OmegaConf.select(cfg, "hydra.sweep.dir"))).absolute()


def job_folder(cfg: DictConfig) -> Path:
    """The folder that Hydra will give to a sweep's job."""
    singleton = HydraConfig.instance()
    before = singleton.cfg
    singleton.set_config(cfg)  # a folder may be named by ${hydra:...}, which asks there
    try:
        return sweep_folder(cfg) / str(OmegaConf.select(cfg, "hydra.sweep.subdir"))
    finally:
        singleton.cfg = before


def found_jobs(folder: Path, schema: type) -> list[SweepJob]:
    """The jobs that have a folder in a sweep's, for a sweep whose jobs nobody knew beforehand."""
    jobs = []
    for config in folder.rglob(".hydra/config.yaml"):
        try:
            settings = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(config))
            number = int(OmegaConf.load(config.with_name("hydra.yaml")).hydra.job.num)
            overrides = tuple(OmegaConf.load(config.with_name("overrides.yaml")))
            one = cast(Settings, OmegaConf.to_object(settings))
            one = choose(one)
        except (ConfigError, PartitionError):  # nothing was found to choose
            pass
        except (*UNREADABLE, OSError):  # killed while Hydra wrote it, or no job's
            continue
        jobs.append(SweepJob(number, overrides, one, config.parent.parent))
    return sorted(jobs, key=lambda job: job.number)


def typed(cfg: DictConfig, conf: Path) -> Any:
    """A composed job as its dataclass, which its primary config names.

    Raises:
        ConfigError: if a value is missing or was removed, or a key was added that the schema lacks.
    """
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.pop("hydra", None)
    schema = cast(type, OmegaConf.get_type(cfg))
    added, removed = _changes(cfg)
    if added:
        raise ConfigError(unknown_key(added[0], schema))
    if missing := sorted(OmegaConf.missing_keys(cfg)) or removed:
        raise ConfigError(missing_value(missing[0], schema, conf))
    return OmegaConf.to_object(cfg)


def check_folder(cfg: DictConfig, key: str) -> None:
    """Check that a job's folder, which `key` names, can be made.

    Raises:
        ConfigError: if it cannot.
    """
    folder = Path(str(OmegaConf.select(cfg, key))).absolute()
    above = folder
    try:
        while not above.exists():
            above = above.parent
    except OSError as error:  # a name that is too long
        raise ConfigError(f"{key}={folder} cannot be made: {error.strerror}; give another folder") from None
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder} cannot be made: {above} is not a folder that this user can write to")
    if (free := shutil.disk_usage(above).free) < _ROOM_BYTES:
        raise ConfigError(f"{key}={folder} cannot be made: the disk of {above} is full ({free >> 10} KiB are left)")


def _changes(cfg: DictConfig, prefix: str = "") -> tuple[list[str], list[str]]:
    """Keys that the schema lacks, and its keys that are not there: `+key=value` and `~key` change even a dataclass."""
    known = {spec.name for spec in fields(cast(Any, OmegaConf.get_type(cfg)))}
    keys = {str(key) for key in cfg}
    added = [prefix + key for key in sorted(keys - known)]
    removed = [prefix + key for key in sorted(known - keys)]
    for key in sorted(keys & known):
        if not OmegaConf.is_missing(cfg, key) and isinstance(cfg._get_node(key), DictConfig):
            more_added, more_removed = _changes(cfg[key], f"{prefix}{key}.")
            added, removed = added + more_added, removed + more_removed
    return added, removed


def _ranks(parallel: DictConfig, *, _root_: DictConfig) -> int:
    layout = cast(ParallelConfig, OmegaConf.to_object(parallel))
    return devices_of(layout, str(_root_.device)) if layout.method == AUTO else layout.ranks


def _method_name(parallel: DictConfig, *, _root_: DictConfig) -> str:
    """A method's name; of one that is to be chosen, the choice's, or AUTO where the job is refused for it."""
    layout = cast(ParallelConfig, OmegaConf.to_object(parallel))
    if layout.method == AUTO:
        try:
            layout = choose(typed(_root_, Path())).parallel
        except (ConfigError, PartitionError):
            return AUTO
    return to_name(layout)
