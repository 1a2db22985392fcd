"""Whether a model fits, from its dims alone: an estimate good enough to refuse what cannot run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from helix.config import environment
from helix.config.methods import baselines_of
from helix.config.schema import (
    ITEMSIZE,
    InferConfig,
    Misfit,
    ModelConfig,
    ParallelConfig,
    WorkloadConfig,
    expert_parallel,
    to_grid,
    to_shape,
)
from helix.partition.decoding import GenerationCost
from helix.partition.families import PretrainedShape
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.phases import Phases
from helix.partition.transformer_cost import TransformerCost

_REPLICATE = ("data", "context", "ulysses")  # whole weights on every rank
_BUILT_WHOLE = ("tensor", "autotp")
# Memory of its own that a forked rank has before it holds any tensor: 40 MB measured (torch 2.13, gloo).
RANK_BYTES = 40e6


@dataclass(frozen=True)
class Estimate:
    """Bytes by what holds them, over `ranks` ranks.

    Args:
        weights: all those ranks' parameters.
        activations: what they hold at once in one inference step, and their processes.
        reference: the single-device model that the results are held against, in fp32 or wider.
    """

    ranks: int
    weights: float
    activations: float
    reference: float


def stored_parameters(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Parameters of one method summed over all ranks, copies included: data replicas, and experts' replicas."""
    shape = to_shape(model)
    experts = shape.layers * shape.experts * shape.expert_parameters
    block = parallel.m * parallel.n if parallel.projection == "block" else 1
    rest = shape.parameters(projects=parallel.aggregate == "project", block=block) - experts
    copies = parallel.ranks if parallel.method in _REPLICATE else parallel.data
    groups = parallel.ranks // (parallel.stage * expert_parallel(model, parallel))
    return copies * rest + groups * experts


def estimate(settings: InferConfig, local_ranks: int) -> Estimate:
    """What the ranks of one host need; the reference is counted on each host, as rank 0's may be this one."""
    model, work = settings.model, settings.workload
    shape = to_shape(model)
    itemsize = ITEMSIZE[settings.precision]
    methods = [settings.parallel, *baselines_of(settings)]
    share = local_ranks / settings.parallel.ranks
    weights = sum(stored_parameters(model, each) for each in methods) * share
    if any(each.method in _BUILT_WHOLE for each in methods):
        weights += local_ranks * shape.parameters()  # each rank draws the whole, then keeps its part
    wide = max(itemsize, 4)
    return Estimate(
        ranks=local_ranks,
        weights=weights * itemsize,
        activations=max(_activations(settings, each) for each in methods) * share + local_ranks * RANK_BYTES,
        reference=shape.parameters() * wide + _cost(model, work, Grid(1, 1), wide).activation_bytes(),
    )


def _activations(settings: InferConfig, parallel: ParallelConfig) -> int:
    """Bytes that one method's ranks hold at once in a step, summed over them."""
    model, work, itemsize = settings.model, settings.workload, ITEMSIZE[settings.precision]
    if parallel.method in _REPLICATE or parallel.method == "single":  # each token on one rank
        return _cost(model, work, Grid(1, 1), itemsize).activation_bytes()
    one = replace(work, batch_size=work.batch_size // parallel.data)
    return parallel.ranks * _cost(model, one, to_grid(parallel), itemsize, parallel.schedule).activation_bytes()


def _cost(
    model: ModelConfig, work: WorkloadConfig, grid: Grid, itemsize: int, schedule: str = "auto"
) -> TransformerCost:
    return TransformerCost(to_shape(model), grid, AttentionOptions(schedule), work.batch_size, work.seq_len, itemsize)


def check_memory(settings: InferConfig, local_ranks: int, device: str) -> None:
    """Check that this host, and each of its GPUs if the ranks compute there, can hold the job.

    Raises:
        Misfit: with the memory needed and the memory there is.
    """
    need = estimate(settings, local_ranks)
    if device == "cuda":
        room = environment.free_gpu_memory_bytes()
        if room is not None:
            _compare(settings, "each GPU", need.weights / local_ranks, need.activations / local_ranks, 0, room, 1)
        _compare(settings, "this machine", 0, 0, need.reference, environment.free_memory_bytes(), 1)
    else:
        free = environment.free_memory_bytes()
        _compare(settings, "this machine", need.weights, need.activations, need.reference, free, local_ranks)


def _compare(
    settings: InferConfig, where: str, weights: float, activations: float, reference: float, free: float, ranks: int
) -> None:
    total = weights + activations + reference
    if total <= free:
        return
    parts = f"weights {_gb(weights)}, activations {_gb(activations)}, single-device reference {_gb(reference)}"
    raise Misfit(
        f"model={settings.model.name} with workload={settings.workload.name} needs about {_gb(total)} GB on {where} "
        f"({ranks} ranks: {parts}), and {_gb(free)} GB are available; take model=dense or model=moe, a smaller "
        "workload.batch_size or workload.seq_len, or precision=bf16-true"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def check_generation_memory(
    settings: InferConfig, prompts: list[str], shape: PretrainedShape, local_ranks: int, device: str
) -> None:
    """Check that this host, and each of its GPUs, can hold the weights and the cache of a generation.

    Raises:
        Misfit: with the memory needed and the memory there is.
    """
    itemsize, share = ITEMSIZE[settings.precision], local_ranks / settings.parallel.ranks
    batch = min(len(prompts), settings.workload.batch_size)
    longest = max(len(prompt.encode()) for prompt in prompts)  # at least a byte a token
    tokens = min(shape.context, longest + settings.generate.max_new_tokens)
    whole = GenerationCost(shape, Grid(1, 1), Phases("batch", "batch"), batch, itemsize)
    methods = 1 + len(baselines_of(settings))
    weights, cache = methods * whole.weight_bytes() * share, whole.cache_bytes(tokens) * share
    # Rank 0 compares when the others have let go of theirs.
    if settings.generate.verify:
        weights = max(weights, whole.weight_bytes())
    need = weights + cache + local_ranks * RANK_BYTES
    where, room = "this machine", environment.free_memory_bytes()
    if device == "cuda":
        where, room = "each GPU", environment.free_gpu_memory_bytes() or int(need)
        need = max((weights + cache) / local_ranks, whole.weight_bytes() if settings.generate.verify else 0)
    if need > room:
        raise Misfit(
            f"model={settings.model.name} needs about {_gb(need)} GB on {where} ({methods} methods on {local_ranks} "
            f"ranks, weights {_gb(weights)}, cache {_gb(cache)}), and {_gb(room)} GB are available; take "
            "precision=bf16-true, fewer prompts at once (workload.batch_size), or generate.verify=false"
        )
