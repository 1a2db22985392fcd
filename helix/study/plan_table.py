"""A plan, for people: what to take, what the other methods would do, and why. Readable from 80 columns up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.config.words import figure, size
from helix.planner import known as known_models
from helix.planner import published as published_tables
from helix.planner.plan import Plan
from helix.planner.search import kind, times_as_good
from helix.planner.work import Estimate, Work

MOST_ROWS = 8
# What a goal looks at: a column's title, and an estimate's figure in it.
_FIGURES: dict[str, tuple[str, Callable[[Estimate], str]]] = {
    "throughput": ("tokens/s", lambda one: figure(one.tokens_per_s)),
    "latency": ("ms", lambda one: figure(one.seconds.total * 1e3)),
    "ttft": ("TTFT, ms", lambda one: figure((one.ttft_s or 0.0) * 1e3)),
    "tpot": ("TPOT, ms", lambda one: figure((one.tpot_s or 0.0) * 1e3)),
    "memory": ("tokens/s", lambda one: figure(one.tokens_per_s)),
}


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


def published(tables: Sequence[published_tables.Table]) -> RenderableType:
    """Every published table beside the time model, which was not fitted to any of them."""
    parts: list[RenderableType] = []
    for one in tables:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("model", min_width=5)
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
        title = Text(one.name, style="bold")
        parts += [title, table, Text(words), Text(one.source.strip(), style="dim"), Text()]
    return Group(*parts)


def known(rows: Sequence[known_models.Row], work: Work, goal: str, hardware: str) -> RenderableType:
    """Well-known models on a few numbers of devices: what to take, and what the best m > 1 would be."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in ("on", "best layout", _FIGURES[goal][0], "memory", "m > 1"):
        table.add_column(column, justify="left" if column == "best layout" else "right", no_wrap=True)
    table.add_column("because", overflow="fold")
    shown = ""
    refused = []
    for row in rows:
        name, shown = ("" if row.model == shown else row.model), row.model
        if row.plan is None:
            refused.append(row)
            table.add_row(name, str(row.devices), "none", "", "", "", _short(row))
            continue
        best = row.plan.best
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        ratio = "only" if row.ratio is None and row.sliced is not None else ratio
        figures = _FIGURES[goal][1](best), size(best.memory.total)
        table.add_row(name, str(row.devices), best.layout.name, *figures, ratio, row.plan.because)
    parts: list[RenderableType] = [Text(f"{hardware}, {_worded(work)}, for {goal}"), Text(), table, Text()]
    parts += [Text(f"{row.model}: {row.refusal}.") for row in refused]
    words = (
        f"m > 1: the best layout with m > 1, times as good in {goal} as the best of all others; empty where none fits."
    )
    band = next((row.plan.band for row in rows if row.plan is not None), "")
    return Group(*parts, Text(), Text(words, style="dim"), Text(band, style="dim"))


def _short(row: known_models.Row) -> str:
    """What a refusal is about."""
    return row.refusal.split(":")[0].split(" (")[0].removeprefix(f"model={row.model} has ")


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
    line.append(f"\nmodel {plan.model} on {plan.devices} devices of {plan.hardware}, {_worded(work)}")
    return line


def _worded(work: Work) -> str:
    new = f" and {work.new_tokens} new ones" if work.new_tokens else ""
    return f"{work.precision}, {work.mode}, batch {work.batch} x {work.length} tokens{new}"


def _table(plan: Plan, title: str, rows: Sequence[Estimate]) -> Table:
    generates = plan.work.mode == "generate"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title, overflow="fold", min_width=12)
    columns = ["tokens/s", *(("TTFT, ms", "TPOT, ms") if generates else ("step, ms",)), "memory", "of best"]
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
            f"{times_as_good(plan.goal, one, plan.best):.2f}",
            style=style,
        )
    return table


def _spread(rows: Sequence[Estimate]) -> list[Estimate]:
    """Some of many rows, evenly over them, both ends among them."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]
