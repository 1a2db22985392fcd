"""What is verified, as integers: which model at which size, by which schedules, in which precisions. No torch.

An oracle is one device that holds everything in fp64, on every rank of this host at once, so a large model is cut down
to `HELD_PARAMETERS` for it. What the partition is about stays as it is: heads, key/value heads, features of a head,
RoPE, QK-norm, mask, experts, the layout of the residual stream. Batch and length are the smallest that every schedule
takes and that no number of slices divides, so that uneven shares are verified too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.phases import DECODE, PREFILL, Phases, check
from helix.partition.schedules import check_schedule, legal_schedules
from helix.partition.shape import TransformerShape, check_ends, check_routing, default_expert_parallel

PRECISIONS = ("fp64", "fp32", "bf16", "fp16")
HELD_PARAMETERS = 8_000_000  # fp64 weights and their gradients: 128 MB a rank
HELD_LAYERS = 2  # the second one's input has come through a first
_LEAST = 64  # no width is cut below this
LARGE = 128.0  # times the usual size: exp of such scores, not taken relative to their largest, overflows in fp32
_STEPS = 3  # of decoding: as many as take turns on the ranks of a group of three


@dataclass(frozen=True)
class Subject:
    """One function on one grid, at the size that an oracle holds.

    Args:
        shape: the model's dims, of which the layer has those of its attention.
        grid: its partition.
        options: how attention is laid over it; the schedule is each case's.
        batch, length: B and T of layer and model.
        ep_size: ranks that share one set of experts.
        whole: whether there is a model around the layer to verify; Hugging Face models have their own.
        cut: what was made smaller, as "width 4096 -> 128".
    """

    shape: TransformerShape
    grid: Grid
    options: AttentionOptions
    batch: int
    length: int
    ep_size: int = 1
    whole: bool = True
    cut: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Tokens that are decoded one by one; those before them are the prompt."""
        return min(_STEPS, self.length - 1)


@dataclass(frozen=True)
class Case:
    """One thing that is held against the oracle.

    Args:
        what: "layer", "model" or "decode".
        schedule: of the layer or model; of decoding the prompt's.
        precision: one of `PRECISIONS`.
        decode: how a head group's cache is cut.
        queries: times their usual size, a power of two.
    """

    what: str
    schedule: str
    precision: str
    decode: str | None = None
    queries: float = 1.0

    @property
    def way(self) -> str:
        way = self.schedule if self.decode is None else f"{self.schedule}, {self.decode}"
        return way if self.queries == 1 else f"{way}, large scores"

    @property
    def name(self) -> str:
        return f"{self.what}, {self.way}, {self.precision}"


def subject_of(
    shape: TransformerShape,
    grid: Grid,
    options: AttentionOptions | None = None,
    ep_size: int | None = None,
    whole: bool = True,
) -> Subject:
    """The model at the size that is verified.

    Raises:
        PartitionError: if the grid does not fit it.
    """
    options = options or AttentionOptions()
    grid.check(shape.heads, shape.kv_heads, shape.head_dim, shape.rope)
    check_ends(shape.layout, shape.width, options.aggregate, options.projection)
    check_routing(shape)
    held = _held(shape, grid, tied=options.aggregate == "concat" or options.projection == "block")
    names = ("width", "heads", "kv_heads", *(("layers", "mlp_hidden", "vocab") if whole else ()))
    pairs = ((name, getattr(shape, name), getattr(held, name)) for name in names)
    cut = tuple(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)
    length = max(5, 2 * grid.m + 1 if grid.m <= 4 else grid.m + 1)
    experts = ep_size or (default_expert_parallel(shape.experts, grid.ranks) if shape.experts else 1)
    return Subject(held, grid, options, grid.m + 1, length, experts, whole, cut)


def _held(shape: TransformerShape, grid: Grid, tied: bool) -> TransformerShape:
    """The shape with as few and narrow layers as an oracle can hold.

    Args:
        tied: whether width is heads * head_dim, so that only both can be cut.
    """
    one = replace(shape, layers=min(shape.layers, HELD_LAYERS))
    while one.parameters() > HELD_PARAMETERS and (smaller := _smaller(one, grid, tied)) is not None:
        one = smaller
    return one


def _smaller(one: TransformerShape, grid: Grid, tied: bool) -> TransformerShape | None:
    """The shape with its largest free dim halved; None if none may be."""
    free = {"mlp_hidden": one.mlp_hidden, "vocab": one.vocab // 4} | ({} if tied else {"width": one.width})
    name = max(free, key=lambda name: free[name])
    if free[name] > _LEAST:
        return replace(one, **{name: getattr(one, name) // 2})
    # A head group keeps a multiple of m key/value heads if it had one: `heads` stays legal.
    unit = 2 * grid.n * (grid.m if one.kv_heads // grid.n % grid.m == 0 else 1)
    if not tied or one.kv_heads % unit:
        return None
    return replace(one, heads=one.heads // 2, kv_heads=one.kv_heads // 2, width=one.heads // 2 * one.head_dim)


def cases_of(subject: Subject, schedules: Sequence[str], precisions: Sequence[str], precision: str) -> list[Case]:
    """Every case: the layer and decoding in all `precisions`, the model in `precision`.

    Args:
        schedules: those to verify, by name.

    Raises:
        PartitionError: if one is not legal here.
    """
    for schedule in schedules:
        check_schedule(schedule, subject.shape.layout, subject.grid, subject.batch, subject.length)
    layers = [Case("layer", schedule, each) for schedule in schedules for each in precisions]
    models = [Case("model", schedule, precision) for schedule in schedules] if subject.whole else []
    decodes = [Case("decode", first, each, then) for first, then in _phases(subject) for each in precisions]
    if "fp32" in precisions and subject.grid.m > 1:
        # 16 bits merge in fp32 as well, and could not resolve such scores.
        pairs = [(first, then) for first, then in _phases(subject) if then == "kvseq"]
        decodes += [Case("decode", first, "fp32", then, LARGE) for first, then in pairs[:1]]
    generates = subject.shape.causal and subject.batch >= subject.grid.m  # samples are dealt out whole
    return [*layers, *models, *(decodes if generates else [])]


def legal(subject: Subject) -> list[str]:
    """Every schedule that is legal here, `perslice` too."""
    return legal_schedules(subject.shape.layout, subject.grid, subject.batch, subject.length)


def _phases(subject: Subject) -> Iterator[tuple[str, str]]:
    """Ways to prefill and to decode, each of them at least once."""
    m, kv_heads = subject.grid.m, subject.shape.kv_heads // subject.grid.n
    prefills = [name for name in PREFILL if _runs(Phases(prefill=name), m, kv_heads)]
    decodes = [name for name in DECODE if _runs(Phases(decode=name), m, kv_heads)]
    for number in range(max(len(prefills), len(decodes))):
        # Backwards, so that a prompt is not only ever cut as its cache is.
        yield prefills[-1 - number % len(prefills)], decodes[number % len(decodes)]


def _runs(phases: Phases, m: int, kv_heads: int) -> bool:
    try:
        check(phases, m, kv_heads, batch=m)
    except PartitionError:
        return False
    return True
