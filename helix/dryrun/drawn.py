"""Tracing a step of Helix's own transformer, whose weights a real run draws, by the methods that lay it over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from helix.config.methods import to_name
from helix.config.schema import InferConfig, ParallelConfig, to_shape
from helix.dryrun.assess import assess
from helix.dryrun.figures import Pair, Traced
from helix.dryrun.tracer import Trace, Tracer
from helix.dryrun.world import DEVICE
from helix.parallel.methods.build import build
from helix.parallel.methods.configured import DTYPES, resolve
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.transformer_cost import TransformerCost
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout as Planned
from helix.planner.machine import Machine
from helix.planner.routing import COMMONEST_BYTE, expected_fullest
from helix.planner.seconds import Seconds
from helix.planner.work import Work
from helix.study.report import MethodLabel, Schedules

STEP = "step"  # as a profile names it


class _Job(Job):
    """A job whose weights have no numbers."""

    def fill(self, model: nn.Module) -> None:
        """Leave them as they were made."""


@dataclass(frozen=True)
class _Routed:
    """How many rows each expert is taken to get; see `_routed`."""

    rows: int
    note: str

    def capacities(self, routes: Sequence[Tensor], ranks: int, rank: int) -> list[int]:
        """In place of `Method.capacities`, which counts them in routes that here have no numbers."""
        return [self.rows] * len(routes)


def trace_step(
    settings: InferConfig, parallel: ParallelConfig, machine: Machine | None, gpu: bool = True
) -> tuple[Traced, Trace]:
    """Build a method as rank 0 of the group that is there, and trace its step.

    Args:
        gpu: see `Tracer`.

    Raises:
        PartitionError: if it cannot be built.
    """
    work, layout = settings.workload, resolve(settings, parallel)
    shape, dtype = to_shape(settings.model), DTYPES[settings.precision]
    job = _Job(shape, work.batch_size, work.seq_len, dtype, DEVICE, settings.seed)
    routed = _routed(job, parallel, layout)
    tracer = Tracer(routed.rows, gpu)
    with tracer, torch.no_grad():
        method = build(parallel.method, job, layout)
        assert method.model is not None, "rank 0 always has a part"
        weights = tracer.live.total
        tokens = torch.zeros(job.batch, job.length, dtype=torch.long, device=DEVICE)
        with tracer.passing(method.model) as trace, method.observed():
            logits = method.step(tokens)
        del logits  # held to here: a step returns them
    method.capacities = routed.capacities  # type: ignore[method-assign]
    cost = _cost(job, parallel, layout)
    found = assess(
        STEP,
        trace,
        machine,
        predicted=_predicted(method),
        flops=cost.flops(0),
        activations=cost.activation_bytes(),
        seconds=None if machine is None else _planned_seconds(settings, parallel, layout, machine),
    )
    return Traced(
        method=_label(parallel, layout),
        ranks=parallel.ranks,
        weights=Pair(weights, method.predicted_weight_bytes()),
        fullest=_first(cost, cost.weight_bytes),
        busiest=_first(cost, partial(_sent, cost, routed.rows)) if parallel.method == "helix" else None,
        passes=[found],
        idle_ranks=method.idle_ranks,
        notes=[routed.note] if routed.note else [],
    ), trace


def _label(parallel: ParallelConfig, layout: Layout) -> MethodLabel:
    schedule = layout.options.schedule if parallel.method == "helix" else None
    grid = layout.grid
    return MethodLabel(to_name(parallel), grid.m, grid.n, Schedules(schedule), layout.data, layout.stage)


def _samples(job: Job, layout: Layout) -> int:
    """Of rank 0, which has one more where the replicas do not divide the batch."""
    return -(-job.batch // layout.data)


def _routed(job: Job, parallel: ParallelConfig, layout: Layout) -> _Routed:
    """The rows of an expert where nobody knows who goes there.

    Ranks that share experts agree on the fullest of them, and send as much for each: chance makes it so full. In one
    process each expert gets its own tokens, an equal share.
    """
    shape = job.shape
    if not shape.experts:
        return _Routed(1, "")
    tokens = -(-_samples(job, layout) * job.length // layout.grid.ranks)
    if parallel.method == "single":
        rows = -(-tokens * shape.top_k // shape.experts)
        return _Routed(rows, f"A trace does not know where tokens go: each expert is taken to get {rows:,} of them.")
    rows = max(1, round(expected_fullest(tokens * shape.top_k, shape.experts, COMMONEST_BYTE)))
    even = tokens * shape.top_k / shape.experts
    return _Routed(
        rows,
        f"A trace does not know where tokens go: the fullest expert is taken to get {rows:,} rows of a rank, as "
        "spaces, which go together, and chance have it, and all are padded to it; the closed form's FLOPs are those "
        f"of {even:,.0f}, an even share.",
    )


def _cost(job: Job, parallel: ParallelConfig, layout: Layout) -> TransformerCost:
    """Closed forms of rank 0's part."""
    whole = parallel.method in ("data", "single")
    options = AttentionOptions("batch", residual="replicated") if parallel.method != "helix" else layout.options
    grid = Grid(1, 1) if whole else layout.grid
    samples = _samples(job, layout)
    return TransformerCost(job.shape, grid, options, samples, job.length, job.dtype.itemsize, layout.ep_size)


def _predicted(method: Method) -> Counter[str] | None:
    job = method.job
    tokens, top_k = job.batch * job.length, job.shape.top_k
    layers = job.shape.layers if job.shape.experts else 0
    return method.predicted([torch.empty(tokens, top_k, dtype=torch.long, device=DEVICE)] * layers)


def _first(cost: TransformerCost, held: Callable[[int], int]) -> tuple[int, int] | None:
    """The first of a replica's ranks with the most bytes, and how many."""
    if cost.grid.ranks == 1:
        return None
    counts = [held(rank) for rank in range(cost.grid.ranks)]
    return counts.index(max(counts)), max(counts)


def _sent(cost: TransformerCost, rows: int, rank: int) -> int:
    return sum(cost.bytes(rank, [rows] * cost.shape.layers).values())


def _planned_seconds(
    settings: InferConfig, parallel: ParallelConfig, layout: Layout, machine: Machine
) -> Seconds | None:
    """The planner's time of the same layout; None where it knows none with these options."""
    method, options = parallel.method, layout.options
    planned = Planned(
        "data" if method == "single" else method,
        layout.grid.m,
        layout.grid.n,
        layout.data,
        prefill=options.schedule if method == "helix" else "batch",
        sharded=method == "tensor" and options.residual == "sharded",
    )
    work = settings.workload
    estimator = Estimator(
        to_shape(settings.model),
        machine,
        Work("forward", work.batch_size, work.seq_len, precision=settings.precision, commonest=COMMONEST_BYTE),
    )
    usual = AttentionOptions(options.schedule)
    if (method == "helix" and options != usual) or estimator.ep_size(planned) != layout.ep_size:
        return None
    return estimator.estimate(planned).seconds
