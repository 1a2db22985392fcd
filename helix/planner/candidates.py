"""Every layout of a number of devices that a model's dims and a batch allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from helix.config.schema import ConfigError
from helix.partition import phases, schedules
from helix.partition.grid import Grid, PartitionError, divisors
from helix.partition.shape import TransformerShape
from helix.planner.layout import Layout
from helix.planner.work import Work


@dataclass(frozen=True)
class Asked:
    """Sizes that are given, not searched; None leaves one free.

    Args:
        recompute: what a backward pass computes again; Helix's own training computes nothing again.
        shard_data: whether replicas share parameters, gradients and AdamW's moments out (FSDP2), in training.
        runnable: only what infer.py and train.py take as a method today.
    """

    m: int | None = None
    n: int | None = None
    data: int | None = None
    stage: int | None = None
    recompute: str = "none"
    shard_data: bool = False
    runnable: bool = False

    @property
    def sizes(self) -> int:
        """How many sizes are given."""
        return sum(size is not None for size in (self.m, self.n, self.data, self.stage))

    def allows(self, layout: Layout) -> bool:
        sizes = ("m", "n", "data", "stage")
        return all(getattr(self, name) in (None, getattr(layout, name)) for name in sizes)


def candidates(shape: TransformerShape, work: Work, devices: int, asked: Asked) -> Iterator[list[Layout]]:
    """Every layout of exactly `devices` ranks, in lists of those that differ in nothing but their schedules.

    Whether they fit in memory is another question.
    """
    for stage in divisors(devices):
        if stage > shape.layers or asked.stage not in (None, stage):
            continue
        for data in divisors(devices // stage):
            if data > work.batch or asked.data not in (None, data):
                continue
            ranks = devices // (stage * data)
            for one in _replicas(shape, work, ranks, data, stage):
                if asked.allows(one) and not (asked.runnable and not _is_method(shape, work, one)):
                    one = one.at(recompute=asked.recompute, shard_data=asked.shard_data)
                    for alike in _scheduled(shape, work, one):
                        # A command that accumulates gradients is told of smaller batches, not of microbatches.
                        if not asked.runnable or one.stage > 1 or alike[0].microbatches == 1:
                            yield alike


def _is_method(shape: TransformerShape, work: Work, one: Layout) -> bool:
    """Whether infer.py or train.py takes this layout; in training, replicas are equal and do not share experts."""
    if one.method == "data" and work.mode == "train" and one.data > 1:
        return work.batch % one.data == 0 and not shape.experts
    return one.runs_in(work.mode)


def _replicas(shape: TransformerShape, work: Work, ranks: int, data: int, stage: int) -> Iterator[Layout]:
    """Ways to lay one replica's stage over `ranks`."""
    even = work.batch % data == 0
    if ranks == 1 and stage == 1:
        if even or not shape.experts:
            yield Layout("data", data=data)
        return
    if not even:
        return
    copies = kv_copies(shape, ranks)
    if copies is not None:
        tensor = Layout("tensor", n=ranks, data=data, stage=stage, kv_copies=copies)
        yield tensor
        if ranks > 1 and (copies > 1 or work.mode == "generate"):  # else Helix on 1 x n is just that
            yield tensor.at(sharded=True)
    if ranks == 1:
        return
    yield from _helix(shape, ranks, data, stage)
    if cuts_tokens(shape, work):
        yield from _by_tokens(shape, work, ranks, data, stage)


def cuts_tokens(shape: TransformerShape, work: Work) -> bool:
    """Whether rivals that cut sequences are searched: not in generation, nor with experts."""
    return work.mode != "generate" and not shape.experts


def methods(shape: TransformerShape, work: Work, asked: Asked) -> tuple[str, ...]:
    """What is searched besides Helix with m > 1, and the products of which are: for people."""
    if asked.runnable and work.mode == "generate":
        return "one device", "m = 1"
    tokens = ("context", "Ulysses") if cuts_tokens(shape, work) and not asked.runnable else ()
    return "data", "tensor", "pipeline", *tokens, "m = 1"


def check_asked(asked: Asked, mode: str) -> None:
    """Check that what only a training has is asked of one.

    Raises:
        ConfigError: if it is not.
    """
    given = {"recompute": (asked.recompute, "none"), "shard_data": (asked.shard_data, False)}
    for name, (value, only) in given.items():
        if mode != "train" and value != only:
            raise ConfigError(f"{name}={str(value).lower()} is of mode=train, not of mode={mode}; leave it out")


def _by_tokens(shape: TransformerShape, work: Work, ranks: int, data: int, stage: int) -> Iterator[Layout]:
    """Rivals that cut sequences: into two chunks for each rank, so that a causal mask leaves them even."""
    for tokens in divisors(ranks)[1:]:
        if work.length % (2 * tokens):
            continue
        if tokens == ranks and kv_copies(shape, tokens) is not None:
            yield Layout("ulysses", data=data, stage=stage, tokens=tokens)
        if kv_copies(shape, ranks // tokens) == 1:
            yield Layout("context", n=ranks // tokens, data=data, stage=stage, tokens=tokens)


def kv_copies(shape: TransformerShape, ranks: int) -> int | None:
    """How often tensor parallelism over `ranks` holds each key/value head; None if it has no whole heads for them."""
    if shape.heads % ranks:
        return None
    if shape.kv_heads % ranks == 0:
        return 1
    return ranks // shape.kv_heads if ranks % shape.kv_heads == 0 else None


def _helix(shape: TransformerShape, ranks: int, data: int, stage: int) -> Iterator[Layout]:
    for n in divisors(ranks):
        grid = Grid(ranks // n, n)
        if grid.fits(shape.layout):
            yield Layout("helix", grid.m, n, data, stage)


def _scheduled(shape: TransformerShape, work: Work, layout: Layout) -> Iterator[list[Layout]]:
    """For each legal number of microbatches the layout with each legal schedule of each phase."""
    batch = -(-work.batch // layout.data)
    # A pipeline needs microbatches, and so do gradients that accumulate; in decoding, stages take turns.
    counts = divisors(batch) if layout.stage > 1 or work.mode == "train" else [1]
    for count in counts:
        cut = layout.at(microbatches=count)
        if layout.m == 1:
            shares = layout.kv_copies > 1 and work.mode == "generate"
            yield [cut, cut.at(decode="kvseq")] if shares else [cut]
            continue
        samples, groups = batch // count, shape.kv_heads // layout.n
        if work.mode == "generate":
            parts = min(layout.stage, batch)
            sizes = (batch // parts, -(-batch // parts))
            prefills = [name for name in phases.PREFILL if _deals(name, layout.m, groups, samples)]
            caches = [name for name in phases.DECODE if all(_deals(name, layout.m, groups, size) for size in sizes)]
        else:
            prefills = [name for name in schedules.EXACT if _runs(shape, layout.grid, name, samples, work.length)]
            caches = [layout.decode]
        yield [cut.at(prefill=prefill, decode=cache) for prefill in prefills for cache in caches]


def _deals(name: str, m: int, kv_heads: int, batch: int) -> bool:
    """Whether an m-group can share a phase of a pretrained model's attention out so."""
    asked = phases.Phases(prefill=name) if name in phases.PREFILL else phases.Phases(decode=name)
    try:
        phases.check(asked, m, kv_heads, batch)
    except PartitionError:
        return False
    return True


def _runs(shape: TransformerShape, grid: Grid, schedule: str, samples: int, length: int) -> bool:
    return schedules.refusal(schedule, shape.layout, grid, samples, length) is None
