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
from helix.planner.candidates import Asked
from helix.planner.catalogue import CONF, check_named
from helix.planner.plan import Plan, plan


def settings(overrides: Sequence[str], conf: Path = CONF) -> PlanConfig:
    """The configuration that a command line's overrides make.

    Raises:
        ConfigError: in one sentence with the legal choices.
    """
    words = [_known(word, conf) for word in overrides]
    prepare((), "plan", PlanConfig)
    try:
        with initialize_config_dir(str(conf), version_base=VERSION_BASE, job_name="plan"):
            one = cast(PlanConfig, typed(compose("plan", words), conf))
    except (ConfigError, PartitionError):
        raise
    except REFUSALS as error:
        raise ConfigError(explain(error, PlanConfig, conf, words)) from error
    check_values(one)
    return one


def plan_of(one: PlanConfig) -> Plan:
    """The plan that was asked for.

    Raises:
        ConfigError, PartitionError: as `helix.plan`.
    """
    given = one.parallel
    return plan(
        one.model,
        one.hardware,
        one.devices,
        mode=one.mode,
        batch=one.workload.batch_size,
        length=one.workload.seq_len,
        new_tokens=one.new_tokens if one.mode == "generate" else 0,
        precision=one.precision,
        goal=one.goal,
        asked=Asked(given.m, given.n, given.data, given.stage, given.recompute, given.shard_data, given.runnable),
    )


def _known(word: str, conf: Path) -> str:
    """`model=llama3_70b` stands for the file among those of known models."""
    key, _, name = word.partition("=")
    if key != "model":
        return word
    if (conf / f"model/known/{name}.yaml").exists():
        return f"model=known/{name}"
    if not (conf / f"model/{name}.yaml").exists():
        check_named("model", name)
    return word
