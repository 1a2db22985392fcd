"""`python -m helix verify`: its options, checked without torch, and what it prints, writes and ends with."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from helix.certify.cases import PRECISIONS
from helix.config import environment
from helix.config.check import check_device, check_sizes, check_started, check_values
from helix.config.schema import (
    ITEMSIZE,
    ConfigError,
    InferConfig,
    PartitionError,
    expert_parallel,
    to_grid,
    to_options,
    to_shape,
)
from helix.planner.catalogue import CONF
from helix.study.plan_command import check_file

# By `precision=`, in Lightning's names.
_NAMES = dict(zip(ITEMSIZE, PRECISIONS, strict=True))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as infer.py takes them: parallel=helix_4x4 model=dense parallel.schedule=rows precision=bf16-true "
        "device=cuda seed=1; precision is the whole model's. Without a schedule every legal one is verified, any of "
        "which parallel.schedule=auto may come to",
    )
    parser.add_argument("--all", action="store_true", help="every legal schedule, also where one is asked for")
    parser.add_argument(
        "--precisions",
        type=_precisions,
        default=PRECISIONS,
        metavar="LIST",
        help="of the attention layer and of decoding; default fp64,fp32,bf16,fp16",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure of every rank here")


def _precisions(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := next((name for name in names if name not in PRECISIONS), None):
        raise argparse.ArgumentTypeError(f"there is no precision {unknown!r}; choose of: {','.join(PRECISIONS)}")
    return names


def run(options: argparse.Namespace) -> None:
    """Verify what was asked for, and print the certificate; of ranks that a launcher started one alone speaks.

    Raises:
        ConfigError, PartitionError: in one sentence, before anything is launched.
        RuntimeError: naming rank, schedule, precision and tensor, if anything is not exact.
        SystemExit: instead, on ranks that do not speak.
    """
    try:
        _verify(options)
    except (ConfigError, PartitionError, RuntimeError) as error:
        if environment.speaks():
            raise
        environment.tell_launcher(str(error))
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from None


def _verify(options: argparse.Namespace) -> None:
    if options.json is not None:
        check_file("--json", options.json)
    one = settings(options.overrides)
    parallel, model = one.parallel, one.model
    device = check_device(one.device, check_started(parallel.ranks))
    _quiet()
    from helix.certify import run as running  # brings torch
    from helix.certify.cases import subject_of
    from helix.certify.table import show

    ep_size = expert_parallel(model, parallel) if model.experts else None
    whole = running.builds(model)
    subject = subject_of(to_shape(model), to_grid(parallel), to_options(parallel, "auto"), ep_size, whole)
    schedule = "auto" if options.all else parallel.schedule
    plan = running.plan_of(subject, schedule, options.precisions, _NAMES[one.precision], one.seed)
    certificate = running.run(plan, device)
    if environment.speaks():
        show(certificate, model.name)
        if options.json is not None:
            certificate.write(options.json)
    if not certificate.passed:
        raise RuntimeError(certificate.verdict())


def settings(overrides: Sequence[str], conf: Path = CONF) -> InferConfig:
    """The configuration that a command line's overrides make, as far as verifying reads it.

    Raises:
        ConfigError, PartitionError: in one sentence with the legal choices.
    """
    from hydra import compose, initialize_config_dir

    from helix.command.choose import choose
    from helix.command.cli import REFUSALS
    from helix.command.compose import VERSION_BASE, prepare, typed
    from helix.command.explain import explain

    words = list(overrides)
    if wrong := next((word for word in words if "=" not in word), None):
        raise ConfigError(f"{wrong!r} is no setting; write KEY=VALUE, as parallel=helix_4x4 or model=dense")
    prepare((), "infer", InferConfig)
    try:
        with initialize_config_dir(str(conf), version_base=VERSION_BASE, job_name="verify"):
            one = cast(InferConfig, typed(compose("infer", words), conf))
    except (ConfigError, PartitionError):
        raise
    except REFUSALS as error:
        raise ConfigError(explain(error, InferConfig, conf, words)) from error
    one = cast(InferConfig, choose(one))
    check_values(one)
    _check(one)
    return one


def _check(one: InferConfig) -> None:
    parallel = one.parallel
    if parallel.method != "helix":
        raise ConfigError(
            f"verify is about m x n grids, and parallel.method={parallel.method} is none; take parallel=helix_4x4 or "
            "any other helix_MxN"
        )
    check_sizes(parallel)
    if parallel.data != 1:
        raise ConfigError(
            f"verify holds one replica, so parallel.data must be 1, not {parallel.data}; its replicas do the same"
        )
    for key, value in (("ckpt", one.ckpt), ("prompt", one.prompt), ("baseline", one.baseline or None)):
        if value is not None:
            raise ConfigError(f"{key}={value} is not read by verify, which draws its weights and inputs; leave it out")


def _quiet() -> None:
    """Gloo's and torch's own warnings of slow starts are not the user's."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
