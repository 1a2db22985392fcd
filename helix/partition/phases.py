"""How a pretrained model's attention is cut over the m-group in its two phases, and who then holds what.

Each rank has its head group's whole queries, keys and values of the new tokens, just gathered. In *prefill* nothing
is in the cache yet, and the m ranks share the work of the prompt; in *decode* they share the cache:

    prefill    a rank computes                      decode    a rank caches
    batch      its own samples                      batch     its own samples
    heads      its own KV heads, with their queries heads     its own KV heads
    rows       its own query rows (zig-zag)         kvseq     tokens p with p % m = its index

Either way each (token, sample, KV head) is in the cache of exactly one rank, so nothing is replicated. The two are
chosen apart: the first call has the whole keys at hand, whatever of them it then keeps.

`auto` takes the first of the lists below that is legal. That is the cheapest by bytes, then by balance, as
`helix.partition.decoding` counts them: `batch` and `heads` send each output once, in equal shares. So does `rows`,
but in shares that differ by a row or two. `kvseq` sends every rank's part of every output with its weight, more than m
times as much, though the same at any length of the context. `batch` is before `heads`: samples lie together.
"""

from __future__ import annotations

from dataclasses import dataclass

from helix.partition.grid import PartitionError

PREFILL = ("batch", "heads", "rows")
DECODE = ("batch", "heads", "kvseq")
AUTO = "auto"


@dataclass(frozen=True)
class Phases:
    """A way of cutting attention for each phase.

    Args:
        prefill: "auto", or one of `PREFILL`.
        decode: "auto", or one of `DECODE`.
    """

    prefill: str = AUTO
    decode: str = AUTO

    @classmethod
    def of(cls, schedule: str | Phases) -> Phases:
        """A schedule by name is that of the prefill; decoding then is `auto`."""
        return schedule if isinstance(schedule, Phases) else cls(prefill=schedule)


def check(phases: Phases, m: int, kv_heads: int, batch: int | None = None) -> None:
    """Check that an m-group can run both phases.

    Args:
        m: ranks of the m-group.
        kv_heads: K/n, those of one head group.
        batch: samples; None if not known yet.

    Raises:
        PartitionError: saying what does not fit, with the names that do.
    """
    for phase, name, names in (("prefill", phases.prefill, PREFILL), ("decode", phases.decode, DECODE)):
        if name == AUTO:
            continue
        reason = _refusal(name, m, kv_heads, batch) if name in names else "a pretrained model has no such schedule"
        if reason:
            legal = [AUTO, *(other for other in names if _refusal(other, m, kv_heads, batch) is None)]
            raise PartitionError(f"{phase}={name} cannot run on m={m}: {reason}; legal: {', '.join(legal)}")


def resolve(phases: Phases, m: int, kv_heads: int, batch: int) -> Phases:
    """The same with "auto" replaced by the cheapest that is legal.

    Raises:
        PartitionError: as `check`.
    """
    check(phases, m, kv_heads, batch)

    def chosen(name: str, names: tuple[str, ...]) -> str:
        legal = (other for other in names if _refusal(other, m, kv_heads, batch) is None)
        return next(legal) if name == AUTO else name

    return Phases(chosen(phases.prefill, PREFILL), chosen(phases.decode, DECODE))


def _refusal(name: str, m: int, kv_heads: int, batch: int | None) -> str | None:
    if name == "batch" and batch is not None and batch % m:
        return f"it deals whole samples to the m ranks, which do not divide a batch of {batch}"
    if name == "heads" and kv_heads % m:
        return f"it deals whole KV heads to the m ranks, which do not divide a head group's {kv_heads}"
    return None


@dataclass(frozen=True)
class Stride:
    """Which tokens a rank has in its cache: those at positions p with p % step = offset.

    Round-robin, so that a cache that grows token by token stays balanced to within one token at every length. All
    tokens have step 1.
    """

    step: int = 1
    offset: int = 0

    def before(self, position: int) -> int:
        """How many of the rank's tokens come before a position."""
        return (position - self.offset + self.step - 1) // self.step

    def count(self, start: int, stop: int) -> int:
        """How many of the rank's tokens are at positions start, .., stop - 1."""
        return self.before(stop) - self.before(start)

    def first(self, start: int) -> int:
        """How far after `start` the rank's next token is, that one included."""
        return (self.offset - start) % self.step


def stride_of(decode: str, m: int, rank: int) -> Stride:
    return Stride(m, rank) if decode == "kvseq" else Stride()


@dataclass(frozen=True)
class Window:
    """What a layer's cache keeps and its next call sees, by position.

    Args:
        size: of a sliding layer, whose queries see `size` tokens, themselves included; None if they see all.
    """

    size: int | None = None

    def start(self, length: int) -> int:
        """The first position that a token at position `length` sees; nothing before it will be needed again."""
        return 0 if self.size is None else max(length - self.size + 1, 0)
