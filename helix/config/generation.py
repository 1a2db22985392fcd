"""What can be known of a generation before torch is imported: the prompt, the sampling, the model, the grid."""

from __future__ import annotations

from helix.config.check import (
    check_device,
    check_logger,
    check_placement,
    check_rivals,
    check_started,
    check_values,
)
from helix.config.dry_run import check_dry_run
from helix.config.folder import check_dims, check_package, folder_at, refuse_length, shape_of
from helix.config.memory import check_generation_memory
from helix.config.methods import baselines_of
from helix.config.schema import (
    PACKAGE,
    ConfigError,
    GenerateConfig,
    InferConfig,
    ModelConfig,
    ParallelConfig,
    PartitionError,
    WorkloadConfig,
    to_grid,
)
from helix.partition import phases
from helix.partition.families import PretrainedShape
from helix.partition.grid import HeadLayout, divisors, legal_grids

# Methods that generate, as main one and as baselines.
MAIN, RIVALS = ("helix", "single"), ("helix", "single", "transformers")
PREFILLS = (phases.AUTO, *phases.PREFILL)
_NAMED = "helix_4x3, helix_4x3_rows, helix_4x3_decode_heads, single, hf_tp3"


def check_generation(settings: InferConfig) -> None:
    """Check a configuration that generates text.

    Raises:
        ConfigError, PartitionError: one sentence with the legal choices.
    """
    check_values(settings)
    if settings.dry_run:
        check_dry_run(settings)
        check_dry_answer(settings)
        return
    prompts = prompts_of(settings)
    check_sampling(settings.generate)
    check_answers(settings.workload)
    if settings.ckpt is not None:
        raise ConfigError("ckpt= holds weights of train.py's; a pretrained model has its own, in model.path")
    if settings.profile:
        raise ConfigError("profile=true traces a step of the benchmark; leave it out with prompt=")
    check_method(settings.parallel)
    _check_baselines(settings)
    room = settings.model.context
    if room is not None and settings.generate.max_new_tokens >= room:
        refuse_length([1], settings.generate.max_new_tokens, room)
    check_pretrained(settings.model)
    check_grid(settings.parallel, settings.model, batch_sizes(len(prompts), settings.workload.batch_size))
    check_logger(settings.logger)
    local_ranks = check_started(settings.parallel.ranks)
    check_placement(settings.parallel)
    device = check_device(settings.device, local_ranks)
    check_generation_memory(settings, prompts, known_shape(settings.model), local_ranks, device)


def check_dry_answer(settings: InferConfig) -> None:
    """Check a generation that is only traced: its prompt may be no more than a length.

    Raises:
        ConfigError, PartitionError: as `check_generation`.
    """
    work, model = settings.workload, settings.model
    if settings.prompt is None and work.seq_len == 1:
        raise ConfigError(
            f"a dry run of model={model.name} needs a prompt's length: give workload.seq_len=1024, or prompt= with "
            "a text"
        )
    sizes = [work.batch_size]
    if settings.prompt is not None:
        check_answers(work)
        sizes = batch_sizes(len(prompts_of(settings)), work.batch_size)[:1]
    if model.context is not None:
        refuse_length([work.seq_len], settings.generate.max_new_tokens, model.context)
    check_method(settings.parallel)
    _check_baselines(settings)
    check_pretrained(model)
    check_grid(settings.parallel, model, sizes)


def prompts_of(settings: InferConfig) -> list[str]:
    """The prompts as a list.

    Raises:
        ConfigError: if there is none, or one is no text.
    """
    prompt, model = settings.prompt, settings.model
    form = "prompt= takes a text, or a list of them: prompt=\"['first','second']\""
    if prompt is None:
        raise ConfigError(f'model={model.name} goes on from a text; give prompt="The capital of France is"')
    found = prompt if isinstance(prompt, list) else [prompt]
    if not found:
        raise ConfigError(f"the list of prompts is empty; {form}")
    for number, each in enumerate(found):
        which = f"prompt {number + 1} of {len(found)}" if len(found) > 1 else "the prompt"
        if not isinstance(each, str):
            raise ConfigError(f"{which} is no text but {each!r}; {form}")
        if not each.strip():
            raise ConfigError(f"{which} is empty; {form}")
    return [str(each) for each in found]


def check_sampling(generate: GenerateConfig) -> None:
    """Check that what is set of the sampling goes together."""
    if generate.temperature == 0:
        for name in ("top_k", "top_p"):
            value = getattr(generate, name)
            if value is not None:
                raise ConfigError(
                    f"generate.{name}={value} is about drawing tokens, and generate.temperature=0 draws none; set "
                    f"generate.temperature above 0, such as 0.8, or leave out generate.{name}"
                )
    if "" in generate.stop:
        raise ConfigError("generate.stop has an empty text, which would end every answer; give texts, or [] for none")


def stop_texts(generate: GenerateConfig) -> tuple[str, ...]:
    """What ends an answer; a command line has no other way to write a new line or a tab."""
    return tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in generate.stop)


def check_answers(work: WorkloadConfig) -> None:
    """Check the workload: an answer's length is its own."""
    if work.seq_len != 1:
        raise ConfigError(
            f"workload.seq_len={work.seq_len} is of the benchmark; a prompt has its own length, and "
            "generate.max_new_tokens says how much follows: leave it out, or take workload=generation"
        )
    if work.warmup < 1:
        raise ConfigError(
            "workload.warmup must be at least 1 to generate text, not 0; the first answer is the one that is shown, "
            "whose memory is measured, and that tells which methods can run"
        )
    if work.text is not None:
        raise ConfigError("workload.text is of the benchmark; with a pretrained model prompt= is the text")


def check_method(parallel: ParallelConfig) -> None:
    """Check that a method, and the options that it was given, can generate."""
    if parallel.method not in MAIN:
        raise ConfigError(
            f"parallel.method={parallel.method} does not generate text; take parallel=helix_4x3 or another grid of "
            "Helix's, or parallel=single; baseline= also takes hf_tp3"
        )
    for name in ("data", "stage"):
        if getattr(parallel, name) != 1:
            raise ConfigError(
                f"parallel.{name} must be 1 to generate text, not {getattr(parallel, name)}; more ranks go into "
                "parallel.m and parallel.n"
            )
    if parallel.method == "single" and parallel.ranks != 1:
        raise ConfigError(
            "parallel=single is one process, so parallel.m and parallel.n must be 1; take parallel=helix"
        )
    for name, only in (("aggregate", "project"), ("projection", "column")):
        if getattr(parallel, name) != only:
            raise ConfigError(
                f"parallel.{name}={getattr(parallel, name)} is another function than the pretrained one; "
                f"parallel.{name} must be {only}"
            )
    if parallel.schedule not in PREFILLS:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} is no schedule of a pretrained model's prompt; choose one of: "
            f"{', '.join(PREFILLS)}"
        )


def _check_baselines(settings: InferConfig) -> None:
    rivals = list(zip(settings.baseline, baselines_of(settings), strict=True))
    for name, layout in rivals:
        if layout.method not in RIVALS or layout.data != 1:
            raise ConfigError(f"baseline={name} does not generate text; methods that do are named like {_NAMED}")
    check_rivals(settings.parallel, rivals)


def check_pretrained(model: ModelConfig) -> None:
    """Check what a folder's configuration tells; that of a package is looked at when its folder is made."""
    if model.path == PACKAGE:
        check_package()
        return
    check_shape(model, shape_of(folder_at(model.path)))


def known_shape(model: ModelConfig) -> PretrainedShape:
    """The sizes that are known before the files of a package are there."""
    if model.path is not None and model.path != PACKAGE:
        return shape_of(folder_at(model.path))
    kv_heads = model.kv_heads or model.heads
    sizes = model.layers, model.width, model.heads, kv_heads, model.head_dim, model.mlp_hidden, model.vocab
    return PretrainedShape("llama", *sizes, context=model.context or 1, tied=True)


def check_shape(model: ModelConfig, shape: PretrainedShape) -> None:
    """Check that a model generates text, and has the sizes that the configuration says."""
    if not shape.causal:
        raise PartitionError(
            f"{shape.family} models read text and write none, so prompt= has nothing to go on with; helixify "
            "partitions them in Python"
        )
    check_dims(model, shape)


def check_grid(parallel: ParallelConfig, model: ModelConfig, batches: list[int]) -> None:
    """Check the grid against the heads, whole after one gather, so that RoPE's pairs bind no slice; and the phases.

    Args:
        batches: sizes of those that the prompts make.
    """
    if parallel.method != "helix":
        return
    layout = HeadLayout(model.heads, model.kv_heads or model.heads, model.head_dim)
    grid = to_grid(parallel)
    try:
        grid.check(layout.heads, layout.kv_heads, layout.head_dim)
    except PartitionError as error:
        if legal_grids(layout, grid.ranks):
            raise
        legal = f"legal m: {divisors(layout.head_dim)}, legal n: {divisors(layout.kv_heads)}"
        raise PartitionError(f"{error}; {legal}") from None
    for batch in sorted(set(batches)):
        try:
            phases.check(to_phases(parallel), grid.m, layout.kv_heads // grid.n, batch)
        except PartitionError as error:
            said = str(error).replace("prefill=", "parallel.schedule=").replace("decode=", "parallel.decode=")
            raise PartitionError(said) from None


def to_phases(parallel: ParallelConfig) -> phases.Phases:
    """The schedules of the prompt and of the tokens after it, as configured."""
    return phases.Phases(parallel.schedule, parallel.decode)


def batch_sizes(prompts: int, batch: int) -> list[int]:
    """How many prompts are answered at once, batch by batch.

    >>> batch_sizes(20, 16)
    [16, 4]
    """
    return [min(batch, prompts - first) for first in range(0, prompts, batch)]
