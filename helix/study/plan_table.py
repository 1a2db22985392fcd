"""A plan, for people: what to take, what the other methods would do, and why. Readable from 80 columns up."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.config.words import figure, size
from helix.planner.papers import BASELINE_TOKENS_PER_S, CLAIMED_TOKENS_PER_S, LENGTH, settings
from helix.planner.plan import Plan
from helix.planner.published import tables
from helix.planner.search import GOALS, kind
from helix.planner.work import Estimate

MOST_ROWS = 8


def render(plan: Plan) -> RenderableType:
    """The table of a plan, for any rich console."""
    blank = Text()
    parts: list[RenderableType] = [_headline(plan), blank, _table(plan, "the best of each method", plan.rivals)]
    if len(plan.pareto) > 1:
        shown = _spread(plan.pareto)
        note = "" if len(shown) == len(plan.pareto) else f" ({len(shown)} of {len(plan.pareto)})"
        parts += [blank, _table(plan, f"nothing beats these in all{note}", shown)]
    parts += [blank, *(Text(f"- {reason}") for reason in plan.reasons), blank]
    parts += [Text(word, style="dim") for word in plan.assumptions]
    parts.append(
        Text(f"{plan.considered:,} legal layouts searched in {plan.search_s:.2f} s, for {plan.goal}.", style="dim")
    )
    return Group(*parts)


def published() -> RenderableType:
    """Every published table beside the time model, which was not fitted to any of them."""
    parts: list[RenderableType] = []
    for one in tables():
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(one.name, min_width=8)
        for column in ("layout", "again", "measured", "modelled", "error", "Calculon", "error"):
            table.add_column(column, justify="left" if column in ("layout", "again") else "right", no_wrap=True)
        for row in one.rows:
            rival = ("", "")
            if row.calculon is not None:
                rival = figure(row.calculon), f"{row.calculon / row.measured - 1:+.1%}"
            figures = figure(row.measured), figure(row.modelled), f"{row.error:+.1%}"
            table.add_row(row.model, row.layout, row.recompute, *figures, *rival)
        worst = one.worst
        words = f"{one.quantity}; median error {one.median_error:.1%}, worst {worst.error:+.1%} ({worst.model})"
        parts += [table, Text(words), Text(one.source.strip(), style="dim"), Text()]
    return Group(*parts)


def papers() -> RenderableType:
    """The papers' settings: claimed, modelled, and what bounds both."""
    parts: list[RenderableType] = []
    for one in settings():
        title = f"{one.model}, batch {one.batch} x {LENGTH}"
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(title, min_width=34)
        for column in ("M tokens/s", "communication", "memory", "fits"):
            table.add_column(column, justify="right", no_wrap=True)
        for row, fits in one.rows:
            name = row.layout.name + (f"  {row.layout.prefill}" if row.layout.m > 1 else "")
            share = f"{row.seconds.exchange / row.seconds.total:.0%}"
            table.add_row(
                name, f"{row.tokens_per_s / 1e6:.3f}", share, size(row.memory.total), "yes" if fits else "no"
            )
        words = (
            f"claimed: {BASELINE_TOKENS_PER_S / 1e6:.2f} M for tensor parallelism x pipeline, "
            f"{CLAIMED_TOKENS_PER_S / 1e6:.2f} M for two-level partitioning; arithmetic alone at the data sheet's "
            f"peak: {one.bound / 1e6:.2f} M"
        )
        parts += [table, Text(words), Text()]
    return Group(*parts)


def _headline(plan: Plan) -> Text:
    work, best = plan.work, plan.best
    line = Text()
    line.append(best.layout.name, style="bold")
    if best.layout.m > 1:
        line.append(f"  schedule {best.layout.prefill}")
        if work.mode == "generate":
            line.append(f", cache by {best.layout.decode}")
    if best.layout.microbatches > 1:
        line.append(f", {best.layout.microbatches} microbatches")
    line.append(f"\nmodel {plan.model} on {plan.devices} devices of {plan.hardware}, {work.precision}, {work.mode}, ")
    line.append(f"batch {work.batch} x {work.length} tokens")
    if work.new_tokens:
        line.append(f" and {work.new_tokens} new ones")
    return line


def _table(plan: Plan, title: str, rows: Sequence[Estimate]) -> Table:
    generates = plan.work.mode == "generate"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title, overflow="fold", min_width=12)
    columns = ["tokens/s", *(("TTFT, ms", "TPOT, ms") if generates else ("step, ms",)), "memory", "x"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for one in rows:
        times = (one.ttft_s or 0.0, one.tpot_s or 0.0) if generates else (one.seconds.total,)
        style = "bold" if one.layout == plan.best.layout else ""
        name = one.layout.name if rows is not plan.rivals else f"{one.layout.name}  {kind(one.layout)}"
        table.add_row(
            name,
            figure(one.tokens_per_s),
            *(figure(time * 1e3) for time in times),
            size(one.memory.total),
            f"{_times_as_good(plan, one):.2f}",
            style=style,
        )
    return table


def _times_as_good(plan: Plan, one: Estimate) -> float:
    """By the plan's goal, against its best; below 1 is worse."""
    own, theirs = GOALS[plan.goal](plan.best), GOALS[plan.goal](one)
    return theirs / own if plan.goal == "throughput" else own / theirs


def _spread(rows: Sequence[Estimate]) -> list[Estimate]:
    """Some of many rows, evenly over them, both ends among them."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]
