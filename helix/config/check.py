"""Everything about a configuration that can be known before anything is imported, launched or loaded."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

from helix.config import environment
from helix.config.dry_run import check_dry_run
from helix.config.memory import check_memory
from helix.config.methods import baselines_of, to_name
from helix.config.schema import (
    PRETRAINED,
    ConfigError,
    GenerateConfig,
    InferConfig,
    LoggerConfig,
    Misfit,
    ModelConfig,
    ParallelConfig,
    WorkloadConfig,
    check_built,
    expert_ranks,
    to_grid,
    to_shape,
)
from helix.config.values import check_values as check_values
from helix.config.values import suggest as suggest
from helix.partition import rivals
from helix.partition.grid import PartitionError, divisors, legal_grids
from helix.partition.placement import check_hosts
from helix.partition.schedules import check_schedule
from helix.partition.shape import check_ends, check_expert_parallel, check_routing

_SIZES = {"m": "feature slices", "n": "head groups", "data": "data replicas", "stage": "pipeline stages"}
_INSTEAD = {"m": "helix", "n": "helix", "data": "helix or dp16", "stage": "tp8_pp2"}


def check(settings: InferConfig) -> None:
    """Check a whole configuration.

    Raises:
        ConfigError: if a value is illegal by itself, or here.
        PartitionError: if values do not fit together. Both are one sentence with the legal choices.
    """
    if settings.model.kind == PRETRAINED:
        from helix.config.generation import check_generation  # which is made of this file's checks

        check_generation(settings)
        return
    check_values(settings)
    check_drawn(settings)
    check_method(settings)
    check_baselines(settings)
    check_model(settings.model, settings.parallel)
    work = settings.workload
    check_workload(work, settings.parallel)
    check_layer(settings.parallel, settings.model, work.batch_size, work.seq_len)
    check_logger(settings.logger)
    if settings.dry_run:  # which asks nothing of this machine
        check_dry_run(settings)
        return
    local_ranks = check_started(settings.parallel.ranks)
    check_placement(settings.parallel)
    device = check_device(settings.device, local_ranks)
    check_memory(settings, local_ranks, device)


def check_drawn(settings: InferConfig) -> None:
    """Check that nothing is set that only pretrained models have: others' weights are drawn, and answer nothing."""
    model = settings.model
    if settings.prompt is not None:
        raise ConfigError(
            f"prompt= needs a pretrained model, and model={model.name} is none; take model=smollm2, or "
            "model=pretrained model.path= with a folder of transformers'"
        )
    if model.path is not None:
        raise ConfigError(f"model.path={model.path} is of a pretrained model; take model=pretrained model.path=..")
    if settings.generate != GenerateConfig():
        raise ConfigError("generate= is about a prompt, and there is none; take model=smollm2 and give prompt=")
    if settings.parallel.decode != "auto":
        raise ConfigError(
            f"parallel.decode={settings.parallel.decode} is about a prompt's answer; take model=smollm2 and prompt=, "
            "or leave it out"
        )


def check_method(settings: InferConfig) -> None:
    """Check the main method: the sizes that only some methods have, and what its way to cut a model needs."""
    parallel, shape, work = settings.parallel, to_shape(settings.model), settings.workload
    check_sizes(parallel)
    if parallel.method == "data":
        rivals.check_data(shape, parallel.data, work.batch_size)
    if parallel.method == "tensor":
        rivals.check_tensor(shape, parallel.n, work.seq_len if parallel.residual == "sharded" else None)
        if parallel.stage > 1:
            batch = work.batch_size // parallel.data
            rivals.check_pipeline(shape, parallel.stage, batch, parallel.microbatches)


def check_sizes(parallel: ParallelConfig) -> None:
    """Check that the sizes that a method does not have are 1."""
    fixed = {"single": ("m", "n", "data", "stage"), "data": ("m", "n", "stage"), "helix": ("stage",)}
    for name in fixed.get(parallel.method, ("m",)):
        if getattr(parallel, name) != 1:
            raise ConfigError(
                f"parallel.method={parallel.method} has no {_SIZES[name]}, so parallel.{name} must be 1, not "
                f"{getattr(parallel, name)}; take parallel={_INSTEAD[name]}"
            )


def check_baselines(settings: InferConfig) -> None:
    """Check that each baseline is a method of this job's ranks, named once.

    What its way to cut a model needs is not checked: where it cannot run, its own words are its result.
    """
    main = settings.parallel
    rivals = list(zip(settings.baseline, baselines_of(settings), strict=True))
    for name, layout in rivals:
        if layout.method != "helix" and (main.aggregate == "concat" or main.projection == "block"):
            raise ConfigError(
                f"baseline={name} cannot compute what parallel.aggregate=concat or projection=block do, another "
                "model; take Helix's own grids as baselines, or project and column"
            )
    check_rivals(main, rivals)


def check_rivals(main: ParallelConfig, rivals: list[tuple[str, ParallelConfig]]) -> None:
    """Check that each rival, by its name, has the main method's ranks or is alone, and is there once."""
    names = [to_name(main)]
    for name, layout in rivals:
        if layout.method != "single" and layout.ranks != main.ranks:
            raise ConfigError(
                f"baseline={name} has {layout.ranks} ranks, and it shares the {main.ranks} of {names[0]}; "
                "choose sizes of that product"
            )
        if to_name(layout) in names:
            raise ConfigError(f"baseline={name} is there already; name each method once")
        names.append(to_name(layout))


def check_model(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that kind and experts agree, and that the experts can be spread over the ranks of one replica."""
    if model.kind == PRETRAINED:
        raise ConfigError(f"model={model.name} is pretrained, and this command draws its weights; take model=tiny")
    if model.vocab < 256:
        raise ConfigError(f"model.vocab must be at least 256, not {model.vocab}: tokens are bytes")
    if model.kind == "dense":
        for name, neutral in (("experts", 0), ("ep_size", None)):
            if getattr(model, name) != neutral:
                raise ConfigError(
                    f"model.kind=dense has no experts, so model.{name}={getattr(model, name)} cannot be; "
                    "take model=moe, or model.kind=moe"
                )
    elif model.experts == 0:
        raise ConfigError("model.kind=moe needs model.experts of at least 1, not 0; take model=dense for an MLP")
    check_built(model)
    check_routing(to_shape(model))
    if model.ep_size is not None:
        check_expert_parallel(model.experts, model.ep_size, expert_ranks(parallel))


def check_workload(workload: WorkloadConfig, parallel: ParallelConfig) -> None:
    """Check that the batch can be dealt to the data replicas, and that there is a text to read."""
    batch, data = workload.batch_size, parallel.data
    if parallel.method != "data":  # whose replicas may differ by a sample
        check_batch("workload.batch_size", batch, data)
    if workload.text is not None:
        size = check_text("workload.text", Path(workload.text))
        if size < workload.seq_len:
            raise ConfigError(
                f"workload.text={workload.text} has {size} bytes, too few for one sequence of "
                f"workload.seq_len={workload.seq_len}; {_wanted('workload.text')}"
            )


def check_batch(key: str, batch: int, data: int) -> None:
    """Check that the batch, which `key` names, can be dealt to the data replicas."""
    if batch % data:
        raise Misfit(f"parallel.data={data} does not divide {key}={batch}; legal parallel.data: {divisors(batch)}")


def check_text(key: str, path: Path) -> int:
    """Check that the text, which `key` names, can be read, and return its bytes."""
    wanted = _wanted(key)
    if not path.exists():
        raise ConfigError(f"{key}={path} does not exist; {wanted}")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        if not os.access(file, os.R_OK):
            raise ConfigError(f"{key}={file} cannot be read; {wanted}")
    return sum(file.stat().st_size for file in files)


def _wanted(key: str) -> str:
    return f"{key} takes a readable file, a folder of them, or null for Python's standard library"


def check_layer(parallel: ParallelConfig, model: ModelConfig, batch: int, seq_len: int) -> None:
    """Check the grid against the heads, the layer's ends against the width, the schedule against both."""
    if parallel.method != "helix":
        return
    shape, grid = to_shape(model), to_grid(parallel)
    try:
        grid.check(shape.heads, shape.kv_heads, shape.head_dim, shape.rope)
    except PartitionError as error:
        if legal_grids(shape.layout, grid.ranks):
            raise
        # No grid of this many ranks is legal, so the error lists none; other numbers of ranks have some.
        runs = shape.head_dim // shape.layout.parts
        raise PartitionError(f"{error}; legal m: {divisors(runs)}, legal n: {divisors(shape.kv_heads)}") from None
    check_ends(shape.layout, shape.width, parallel.aggregate, parallel.projection)
    check_schedule(parallel.schedule, shape.layout, grid, batch // parallel.data, seq_len)


def check_logger(logger: LoggerConfig) -> None:
    """Check that an online run has an account, which W&B itself would ask for after everything has started."""
    if logger.kind != "wandb" or logger.mode != "online":
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _has_login(host):
        return
    raise ConfigError(
        f"logger.mode=online needs an API key for {host}: set WANDB_API_KEY or run `wandb login`; "
        "without an account take logger=wandb (offline) or logger=none"
    )


def _has_login(host: str) -> bool:
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in candidates):
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def check_started(ranks: int) -> int:
    """Check the configured ranks against those that are running, and return how many this host has."""
    environment.check_switches()
    launcher = environment.started()
    if launcher is None:
        if ranks > (most := environment.most_ranks()):
            raise Misfit(
                f"parallel.m * n * data * stage is {ranks} ranks, and this machine takes {most} (8 on each of its "
                "cores, or 16); choose fewer, or set HELIX_MAX_RANKS to try"
            )
        return ranks
    if launcher.ranks != ranks:
        raise Misfit(
            f"parallel.m * n * data * stage is {ranks} ranks, and {launcher.by} started {launcher.ranks}; start "
            f"{ranks}, choose a grid of {launcher.ranks}, or run without a launcher and the ranks are forked"
        )
    return launcher.local_ranks


def check_placement(parallel: ParallelConfig) -> None:
    """Check that the hosts that the launcher counts can keep the placement; the ranks check it on the real ones.

    On one host `slices_across` is refused, not taken for `auto`: a sweep over placements passes over it with the
    reason, where it would else hold one figure twice under two names.
    """
    launcher = environment.started()
    check_hosts(parallel.placement, parallel.ranks, 1 if launcher is None else launcher.hosts, parallel.m)


def check_device(device: str, local_ranks: int) -> str:
    """Check that CUDA, if it is asked for, has a GPU for each rank; returns the device that `auto` means.

    A rank takes the GPU of its number on its host, so it has to see all of them.
    """
    present = environment.gpus()
    if device != "cpu" and 0 < present < local_ranks and environment.dealt_out():
        raise ConfigError(
            f"SLURM shows each task {present} of its host's GPUs alone (--gpus-per-task), and {local_ranks} ranks of "
            "one host have to see all of theirs; ask for --gpus-per-node, or choose device=cpu"
        )
    if device == "cuda" and present < local_ranks:
        raise ConfigError(
            f"device=cuda needs a GPU for each of {local_ranks} ranks, and this machine has {present}; "
            "choose device=cpu, or device=auto, which takes GPUs only where there are enough"
        )
    return environment.resolve_device(device, local_ranks)
