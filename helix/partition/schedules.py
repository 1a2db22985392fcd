"""The schedules by name: what each needs, and whether it equals the attention it partitions.

A schedule says what moves inside the m ranks of one head group (the `slice` axis) around the core
attention. The weights stay sliced over features in all of them.
"""

from __future__ import annotations

from helix.partition.grid import Grid, HeadLayout, PartitionError

# In order of preference: where two exact schedules cost the same by the closed forms, `auto` takes the first.
# `batch` before `heads`: the same bytes, but samples lie together already, where heads are copied to be regrouped
# (measured: 0.73 against 0.68 of `perslice`'s speed, paper/LOG.md, 2026-11-22).
EXACT = ("batch", "heads", "rows", "gather", "score")
# The papers' own formula. It equals attention with heads * m heads of width head_dim / m, not the attention
# with `heads` heads (relative distance 0.7 to 0.9 on random inputs).
INEXACT = ("perslice",)
SCHEDULES = INEXACT + EXACT


def refusal(schedule: str, layout: HeadLayout, grid: Grid, batch: int, length: int) -> str | None:
    """Why `schedule` cannot run this attention on this grid, or None if it can.

    `batch` and `rows` deal samples and query rows unevenly where m does not divide them, so they only
    need one for each rank; no padding is moved or computed.
    """
    if schedule not in SCHEDULES:
        return f"there is no schedule {schedule!r}"
    if schedule == "batch" and batch < grid.m:
        return f"it deals samples to m={grid.m} ranks, and the batch has {batch}"
    if schedule == "rows" and length < grid.m:
        return f"it deals query rows to m={grid.m} ranks, and the sequence has {length}"
    if schedule == "heads":
        for name, count in (("heads", layout.heads // grid.n), ("kv_heads", layout.kv_heads // grid.n)):
            if count % grid.m:
                return f"it deals whole heads to m={grid.m} ranks, which does not divide the group's {name}={count}"
    return None


def legal_schedules(layout: HeadLayout, grid: Grid, batch: int, length: int) -> list[str]:
    return [name for name in SCHEDULES if refusal(name, layout, grid, batch, length) is None]


def check_schedule(schedule: str, layout: HeadLayout, grid: Grid, batch: int, length: int) -> None:
    """Check that a schedule, or `auto`, can run.

    Raises:
        PartitionError: saying why not, with the schedules that can.
    """
    if schedule == "auto":
        return
    reason = refusal(schedule, layout, grid, batch, length)
    if reason:
        legal = ["auto", *legal_schedules(layout, grid, batch, length)]
        raise PartitionError(f"schedule={schedule} cannot run on {grid.name}: {reason}; legal: {', '.join(legal)}")


def deal_sizes(count: int, ranks: int) -> list[int]:
    """How many of `count` things each rank is dealt: as even as can be, with no padding."""
    return [(r + 1) * count // ranks - r * count // ranks for r in range(ranks)]


def row_chunks(length: int, ranks: int, causal: bool) -> list[list[range]]:
    """The runs of query rows that each rank computes under `rows`, in order of rank.

    Causal attention makes late rows dearer than early ones, so they are dealt zig-zag: of 2 m chunks rank r
    computes chunks r and 2 m - 1 - r, which together cost the same on every rank.
    """
    pieces = 2 * ranks if causal else ranks
    runs = [range(c * length // pieces, (c + 1) * length // pieces) for c in range(pieces)]
    return [[runs[r], runs[-1 - r]] if causal else [runs[r]] for r in range(ranks)]
