"""What a dry run takes, which needs neither the ranks nor the memory of a real one."""

from __future__ import annotations

from helix.config.methods import baselines_of
from helix.config.parallel import PEERS, ParallelConfig
from helix.config.schema import ConfigError, InferConfig

_TRACED = "a grid of Helix's, single, dp16, or tp16"


def check_dry_run(settings: InferConfig) -> None:
    """Check that everything that is asked for can be traced.

    Raises:
        ConfigError: with what can.
    """
    if settings.profile:
        raise ConfigError("profile=true measures a step, and dry_run=true runs none and predicts a trace; choose one")
    if settings.ckpt is not None:
        raise ConfigError("ckpt= gives weights their numbers, and dry_run=true computes with none; leave it out")
    _check_traced("parallel", settings.parallel)
    for name, layout in zip(settings.baseline, baselines_of(settings), strict=True):
        _check_traced(f"baseline={name}", layout)


def _check_traced(key: str, layout: ParallelConfig) -> None:
    if layout.stage > 1:
        raise ConfigError(
            f"{key} has {layout.stage} pipeline stages, which a dry run does not trace; take {_TRACED}, and "
            "python -m helix plan for pipelines"
        )
    if layout.method in PEERS:
        raise ConfigError(f"{key} is another project's code, which a dry run does not trace; take {_TRACED}")
