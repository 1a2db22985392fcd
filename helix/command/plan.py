"""The settings of `python -m helix plan`: composed and checked as those of any command, and no job's folder made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir

from helix.command.cli import REFUSALS
from helix.command.compose import VERSION_BASE, prepare, typed
from helix.command.explain import explain
from helix.config.check import check_values
from helix.config.plan_schema import PlanConfig
from helix.config.schema import ConfigError, PartitionError
from helix.planner import known
from helix.planner.candidates import Asked, check_asked
from helix.planner.catalogue import CONF, check_named, hardware, is_file, is_folder, model, shape
from helix.planner.machine import machine_of
from helix.planner.plan import Plan, plan
from helix.planner.search import check_goal
from helix.planner.winning import Panel, Place, panels
from helix.planner.work import Work


def settings(overrides: Sequence[str], conf: Path = CONF) -> PlanConfig:
    """The configuration that a command line's overrides make.

    model= also takes a Hugging Face folder's path, and hardware= a file's.

    Raises:
        ConfigError: in one sentence with the legal choices.
    """
    folders = [word for word in overrides if word.startswith("model=") and is_folder(word.partition("=")[2])]
    files = [word for word in overrides if word.startswith("hardware=") and is_file(word.partition("=")[2])]
    words = [_known(word, conf) for word in overrides if word not in (*folders, *files)]
    _check_words(words, files)
    prepare((), "plan", PlanConfig)
    try:
        with initialize_config_dir(str(conf), version_base=VERSION_BASE, job_name="plan"):
            one = cast(PlanConfig, typed(compose("plan", words), conf))
    except (ConfigError, PartitionError):
        raise
    except REFUSALS as error:
        raise ConfigError(explain(error, PlanConfig, conf, words)) from error
    if folders:
        one.model = model(folders[-1].partition("=")[2])
    if files:
        one.hardware = hardware(files[-1].partition("=")[2])
    check_values(one)
    return one


def _check_words(words: Sequence[str], files: Sequence[str]) -> None:
    for word in words:
        if word.startswith("parallel.goal="):
            raise ConfigError(f"there is no key parallel.goal here; write goal={word.partition('=')[2]}")
        if word.startswith("hardware.") and files:
            raise ConfigError(f"{word} cannot be given with {files[-1]}; write it into that file")


def plan_of(one: PlanConfig) -> Plan:
    """The plan that was asked for.

    Raises:
        ConfigError, PartitionError: as `helix.plan`.
    """
    return plan(
        one.model,
        one.hardware,
        one.devices,
        mode=one.mode,
        batch=one.workload.batch_size,
        length=one.workload.seq_len,
        new_tokens=one.new_tokens,
        precision=one.precision,
        goal=one.goal,
        asked=_asked(one),
    )


def map_of(one: PlanConfig) -> list[Panel]:
    """Where slices win with these settings.

    Raises:
        ConfigError, PartitionError: as `helix.plan`.
    """
    check_goal(one.goal, one.mode)
    check_asked(_asked(one), one.mode)
    devices = machine_of(one.hardware, one.precision, one.devices).devices
    return panels(Place(shape(one.model, one.mode), one.hardware, devices, work_of(one), one.goal, _asked(one)))


def known_of(one: PlanConfig) -> list[known.Row]:
    """The plans of well-known models with these settings; `model` and `devices` are not asked for.

    Raises:
        ConfigError: as `helix.plan`.
    """
    return list(known.rows(one.hardware, work_of(one), one.goal, _asked(one)))


def work_of(one: PlanConfig) -> Work:
    """What the devices are to do."""
    new_tokens = one.new_tokens if one.mode == "generate" else 0
    return Work(one.mode, one.workload.batch_size, one.workload.seq_len, new_tokens, one.precision)


def _asked(one: PlanConfig) -> Asked:
    given = one.parallel
    return Asked(given.m, given.n, given.data, given.stage, given.recompute, given.shard_data, given.runnable)


def _known(word: str, conf: Path) -> str:
    """`model=llama3_70b` stands for the file among those of known models."""
    key, _, name = word.partition("=")
    if key == "hardware" and name.endswith((".yaml", ".yml")):  # that is not there
        check_named("hardware", name)
    if key != "model":
        return word
    if (conf / f"model/known/{name}.yaml").exists():
        return f"model=known/{name}"
    check_named("model", name)
    return word
