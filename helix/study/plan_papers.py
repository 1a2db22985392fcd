"""The papers' settings, for people: claimed beside modelled, every method and every grid with every schedule."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.config.words import size
from helix.partition.schedules import EXACT, SCHEDULES
from helix.planner.papers import HARDWARE, LENGTH, Setting
from helix.planner.work import HEADROOM, Estimate


def render(found: list[Setting]) -> RenderableType:
    """A table of rivals and one of grids x schedules for each model, readable from 80 columns up."""
    parts: list[RenderableType] = []
    for one in found:
        claim = one.claim
        title = Text(f"{claim.model}, batch {claim.batch} x {LENGTH}", style="bold")
        title.append(f'  "{claim.paper}", {claim.section}', style="not bold dim")
        parts += [title, _claimed(one), Text(), _methods(one), Text(), _schedules(one), Text(), _bounds(one), Text()]
    low, high = found[0].reached
    parts += [
        Text(
            f"M tokens/s on 16 GPUs of {HARDWARE}, modelled. Range: what is left of it if this model is as far off as "
            f"in published tables of training on A100s, where {low:.2f} to {high:.2f} of the modelled speed was "
            "measured (python -m helix plan --published). No run on H100s stands behind it. us/token: collectives' "
            "time over all tokens of a step. in: passes that the batch is cut into, one after the other, so that it "
            f"fits into {HEADROOM:.0%} of the memory; a blank is a schedule that is not legal, or fits in no number "
            "of passes. perslice is the papers' formula, which is not h-head attention; all others are.",
            style="dim",
        )
    ]
    return Group(*parts)


def as_dict(found: list[Setting]) -> dict[str, Any]:
    """For JSON: tokens/s, and seconds and bytes of a step."""
    return {"hardware": HARDWARE, "length": LENGTH, "settings": [_as_dict(one) for one in found]}


def _as_dict(one: Setting) -> dict[str, Any]:
    rows = {"rivals": one.rivals, "grids": one.grids, "best": (one.best,)}
    return asdict(one.claim) | {
        "arithmetic_at_peak_tokens_per_s": one.bound,
        "reached_in_published_tables": one.reached,
        **{name: [_figures(row) for row in found] for name, found in rows.items()},
    }


def _figures(row: Estimate) -> dict[str, Any]:
    return {
        "name": row.layout.name,
        "schedule": row.layout.prefill if row.layout.m > 1 else None,
        "pieces": row.layout.microbatches,
        "tokens_per_s": row.tokens_per_s,
        "seconds": asdict(row.seconds),
        "memory_bytes": row.memory.total,
    }


def _claimed(one: Setting) -> Text:
    (base, proposed), (slow, quick) = one.claim.tokens_per_s, one.claim.ms_per_token
    return Text(
        f"claimed: TP8 x PP2 {base / 1e6:.2f} M tokens/s, communication {slow * 1e3:.0f} us a token; proposed "
        f"{proposed / 1e6:.2f} M, {quick * 1e3:.0f} us (of {1e6 / proposed:.2f} us that a token takes in all at that "
        "speed)"
    )


def _methods(one: Setting) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", min_width=12)
    for column in ("M tokens/s", "range", "in exchange", "us/token", "memory", "in"):
        table.add_column(column, justify="right", no_wrap=True)
    tokens = one.claim.batch * LENGTH
    rows = [*one.rivals, *(row for row in one.grids if row.layout.m == 1), *_best_exact(one)]
    for row in sorted(rows, key=lambda each: -each.tokens_per_s):
        low, high = (f"{part * row.tokens_per_s / 1e6:.2f}" for part in one.reached)
        table.add_row(
            row.layout.name + (f" {row.layout.prefill}" if row.layout.m > 1 else ""),
            f"{row.tokens_per_s / 1e6:.3f}",
            f"{low} .. {high}",
            f"{row.seconds.exchange / row.seconds.total:.0%}",
            f"{row.seconds.exchange / tokens * 1e6:.2g}",
            size(row.memory.total),
            str(row.layout.microbatches),
        )
    return table


def _best_exact(one: Setting) -> list[Estimate]:
    """The fastest exact schedule of each grid with m > 1."""
    found: dict[str, Estimate] = {}
    for row in sorted(one.grids, key=lambda each: -each.tokens_per_s):
        if row.layout.m > 1 and row.layout.prefill in EXACT:
            found.setdefault(row.layout.grid.name, row)
    return list(found.values())


def _schedules(one: Setting) -> Table:
    """Grids down, schedules across."""
    found = {(row.layout.grid.name, row.layout.prefill): row for row in one.grids if row.layout.m > 1}
    names = [name for name in SCHEDULES if any(schedule == name for _, schedule in found)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("M tokens/s", min_width=12)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for grid in dict.fromkeys(grid for grid, _ in found):
        table.add_row(grid, *(_cell(found.get((grid, name))) for name in names))
    return table


def _cell(row: Estimate | None) -> str:
    return "" if row is None else f"{row.tokens_per_s / 1e6:.3f}"


def _bounds(one: Setting) -> Text:
    best, parts = _best_exact(one)[0], one.best.layout.microbatches
    claimed = one.claim.tokens_per_s[1]
    theirs = max((row for row in one.grids if row.layout.prefill == "perslice"), key=lambda row: row.tokens_per_s)
    low, high = (part * theirs.tokens_per_s / claimed for part in one.reached)
    pieces = f" in {parts} passes" if parts > 1 else ""
    return Text(
        f"The papers' formula at best {theirs.tokens_per_s / 1e6:.3f} ({theirs.layout.name}): "
        f"{theirs.tokens_per_s / claimed:.2f} of the claim, {low:.2f} to {high:.2f} by the range; exact "
        f"{best.tokens_per_s / 1e6:.3f} ({best.layout.name}, {best.layout.prefill}). Fastest of all: "
        f"{one.best.layout.name}{pieces}, {one.best.tokens_per_s / 1e6:.3f}. Arithmetic alone at the data sheet's "
        f"peak: {one.bound / 1e6:.2f}."
    )
