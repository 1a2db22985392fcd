"""`parallel=auto`: the planner's layout in its place, before anything else looks at a job's settings. Knows no torch.

All that follows, checks, a folder's name, ranks and reports, sees the layout that was chosen as if it had been named.
Every process of a job chooses by itself and comes to the same: there is no chance in the search, and what it asks of
the machine, ranks and memory, is not what is free at the moment.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from helix.command.explain import group_options
from helix.config import environment
from helix.config.check import check_values
from helix.config.generation import batch_sizes, prompts_of
from helix.config.methods import from_name, to_name
from helix.config.parallel import AUTO, GOALS
from helix.config.schema import PACKAGE, PRETRAINED, ConfigError, HardwareConfig, InferConfig, ParallelConfig, Settings
from helix.config.train_schema import TrainConfig
from helix.planner import catalogue
from helix.planner.candidates import Asked
from helix.planner.chosen import chosen
from helix.planner.layout import Layout
from helix.planner.plan import Plan, plan
from helix.planner.routing import COMMONEST_BYTE
from helix.planner.work import Work

P = TypeVar("P", bound=ParallelConfig)
_SIZES = ("m", "n", "data", "stage")
# The planner chooses these with the layout, or knows nothing but their defaults.
_OPTIONS = ("schedule", "decode", "aggregate", "concat", "projection", "residual", "microbatches")
# Of English text, as the vocabularies of today's models cut it. A prompt's own tokens are not counted: what does it is
# imported with the model.
BYTES_PER_TOKEN = 4


def choose(one: Settings) -> Settings:
    """The same settings, with a layout where `parallel=auto` asks for one.

    Raises:
        ConfigError: if a key is wrong that the choice needs, or a figure of the hardware is missing.
        PartitionError, Misfit: if no layout is legal, or none fits.
    """
    assert isinstance(one, InferConfig | TrainConfig), one
    if one.chosen is not None:
        raise ConfigError("chosen= is what parallel=auto comes to; leave it out")
    if one.parallel.method != AUTO:
        for name in ("devices", "goal"):
            if (value := getattr(one.parallel, name)) is not None:
                raise ConfigError(f"parallel.{name}={value} is of parallel=auto; take that, or leave it out")
        return one
    _check_asked(one)
    devices = devices_of(one.parallel, one.device)
    hardware = _hardware(one, devices)
    best = _plan(one, hardware, devices)
    if isinstance(one, TrainConfig):
        return replace(one, parallel=concrete(best.best.layout, "train", one.parallel), chosen=chosen(best))
    layout = concrete(best.best.layout, best.work.mode, one.parallel)
    if one.model.kind == PRETRAINED and len(set(_batches(one))) > 1:  # each batch has the schedules that fit it
        layout = replace(layout, schedule="auto", decode="auto")
    # One that is the layout itself is not measured twice.
    baseline = [name for name in one.baseline if name != to_name(layout)]
    # A trace's times are those of the machine that the choice was made for.
    traced = hardware if one.dry_run else one.hardware
    return replace(one, parallel=layout, baseline=baseline, hardware=traced, chosen=chosen(best))


def concrete(layout: Layout, mode: str, asked: P) -> P:
    """A layout of the planner's as a command is told it.

    Args:
        asked: what else it was told.
    """
    named = from_name(layout.name)
    sliced = layout.method == "helix" and layout.m > 1
    return replace(
        asked,
        method=named.method,
        m=named.m,
        n=named.n,
        data=named.data,
        stage=named.stage,
        schedule=layout.prefill if sliced else "auto",
        decode=layout.decode if sliced and mode == "generate" else "auto",
        residual=named.residual,
        microbatches=layout.microbatches if layout.stage > 1 else asked.microbatches,
        devices=None,
        goal=None,
    )


def devices_of(parallel: ParallelConfig, device: str) -> int:
    """How many devices a layout is to have: as many as were asked for, were started, or are here."""
    if parallel.devices is not None:
        return parallel.devices
    launcher = environment.started()
    if launcher is not None:
        return launcher.ranks
    return (environment.gpus() if device != "cpu" else 0) or environment.cores()


def _check_asked(one: InferConfig | TrainConfig) -> None:
    """Check the values that the choice is made by."""
    parallel = one.parallel
    given: dict[str, Any] = {name: getattr(parallel, name) or 1 for name in _SIZES}
    valued: Any = replace(parallel, method="helix", **given)
    check_values(replace(one, parallel=valued))
    if parallel.goal is not None and parallel.goal not in (legal := _goals(one)):
        raise ConfigError(
            f"parallel.goal={parallel.goal} is of generated text (model=smollm2 prompt=..); here choose one of: "
            f"{', '.join(legal)}"
        )
    own = type(parallel)(method=AUTO, m=0, n=0)
    for name in _OPTIONS:
        if (value := getattr(parallel, name)) != getattr(own, name):
            raise ConfigError(
                f"parallel.{name}={value} cannot be given with parallel=auto, which chooses all but the sizes of the "
                "exact attention's layout itself; leave it out, or take parallel=helix"
            )
    if one.model.ep_size is not None:
        raise ConfigError(
            f"model.ep_size={one.model.ep_size} cannot be given with parallel=auto, which chooses it with the layout; "
            "leave it out, or take parallel=helix"
        )


def _goals(one: InferConfig | TrainConfig) -> list[str]:
    return [name for name in GOALS if _generates(one) or name not in ("ttft", "tpot")]


def _generates(one: InferConfig | TrainConfig) -> bool:
    return isinstance(one, InferConfig) and one.model.kind == PRETRAINED


def _plan(one: InferConfig | TrainConfig, hardware: HardwareConfig, devices: int) -> Plan:
    parallel, work = one.parallel, _work(one)
    shares = getattr(parallel, "shard_data", False)  # which training alone has
    sizes: dict[str, Any] = {name: getattr(parallel, name) or None for name in _SIZES}
    if isinstance(one, InferConfig) and one.dry_run:
        sizes["stage"] = sizes["stage"] or 1  # pipelines are not traced
    # What another project's package brings is known better by its name than by the sizes that a prompt's checks need.
    model = "smollm2" if one.model.path == PACKAGE else one.model
    return plan(
        model,
        hardware,
        devices,
        mode=work.mode,
        batch=work.batch,
        length=work.length,
        new_tokens=work.new_tokens,
        precision=work.precision,
        goal=parallel.goal or ("tpot" if work.mode == "generate" else "throughput"),
        asked=Asked(**sizes, shard_data=shares, runnable=True),
        commonest=work.commonest,
    )


def _work(one: InferConfig | TrainConfig) -> Work:
    """What the devices are to do."""
    if isinstance(one, TrainConfig):
        data = one.data
        return Work("train", data.batch_size, data.seq_len, precision=one.precision, commonest=COMMONEST_BYTE)
    if not _generates(one):
        given = one.workload
        return Work("forward", given.batch_size, given.seq_len, precision=one.precision, commonest=COMMONEST_BYTE)
    longest = max(len(prompt.encode()) for prompt in prompts_of(one))
    length = -(-longest // BYTES_PER_TOKEN)
    return Work("generate", _batches(one)[0], length, one.generate.max_new_tokens, one.precision)


def _batches(one: InferConfig) -> list[int]:
    return batch_sizes(len(prompts_of(one)), one.workload.batch_size)


def _hardware(one: InferConfig | TrainConfig, devices: int) -> HardwareConfig:
    """The hardware whose figures decide: on a CPU the catalogue's, with this machine's cores and memory.

    Raises:
        ConfigError: on GPUs, if none is named.
    """
    given, local = one.hardware, environment.local_ranks(devices)
    if given.name != AUTO:
        return given
    if environment.resolve_device(one.device, local) == "cuda":
        files = [name for name in group_options(catalogue.CONF, "hardware") if name not in (AUTO, "cpu")]
        raise ConfigError(
            "parallel=auto needs hardware= on GPUs, whose kind and links nobody can ask for before torch is there; "
            f"choose one of: {', '.join(f'hardware={name}' for name in files)}, or have python -m helix calibrate "
            "measure this machine"
        )
    own = {spec.name: getattr(given, spec.name) for spec in fields(given) if spec.name not in ("name", "source")}
    said: dict[str, Any] = {key: value for key, value in own.items() if type(value) in (int, float)}
    here = replace(
        catalogue.hardware("cpu"),
        devices_per_host=environment.cores(),
        memory_GB_per_device=environment.memory_bytes() / local / 1e9,
        ranks_take_turns=True,
    )
    return replace(here, **said)
