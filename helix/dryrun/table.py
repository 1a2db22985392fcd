"""A dry run, for people. Readable from 80 columns up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.config.words import figure, size
from helix.dryrun.figures import DryRun, Pair, Pass, Refused, Traced
from helix.dryrun.operators import KINDS
from helix.dryrun.tracer import PARTS
from helix.study.table import columns, mark
from helix.study.terminal import Terminal

# Of two estimates, a difference that rounds to 0.0 %.
UNSEEN = 5e-4


def show(run: DryRun, trace: Path | None = None, console: Console | None = None) -> None:
    """Print the table of a dry run.

    Args:
        trace: the timeline's file, if there is one.
    """
    (console or Terminal()).print(render(run, trace))


def render(run: DryRun, trace: Path | None = None) -> RenderableType:
    """The table of a dry run, for any rich console."""
    blank, main = Text(), run.main
    parts: list[RenderableType] = [_headline(run), blank, _memory(run)]
    for each in main.passes:
        parts += [blank, _traffic(each, main), blank, _work(each)]
        if each.seconds is not None:
            parts += [blank, _times(each), blank, _parts(each, each.seconds)]
    if run.baselines:
        parts += [blank, _side_by_side(run)]
    notes = [*main.notes, *_others(run), *run.notes]
    parts += [blank, *(Text(f"- {note}", style="dim") for note in notes)]
    if trace is not None:
        parts.append(Text(f"timeline: {_short(trace)}", style="dim", no_wrap=True, overflow="fold"))
    return Group(*parts)


def _headline(run: DryRun) -> Text:
    method = run.main.method
    schedule = " / ".join(name for name in (method.schedule.prefill, method.schedule.decode) if name)
    line = Text()
    line.append(method.name, style="bold")
    if schedule:
        line.append(f"  {method.m} slices x {method.n} head groups, schedule {schedule}")
    ranks = "1 rank" if run.main.ranks == 1 else f"{run.main.ranks:,} ranks"
    line.append(f", {ranks}\ndry run: rank {run.rank} traced in {run.traced_s:.1f} s, nothing computed\n")
    line.append(f"model {run.model['name']}, {run.precision}, batch {run.batch} x {run.length} tokens, ")
    line.append(f"hardware {run.hardware['name']}")
    return line


def _memory(run: DryRun) -> Table:
    main = run.main
    table = columns("memory of rank 0", "traced", "closed form", "difference")
    _row(table, "weights", main.weights, exact=True)
    if main.cache is not None:
        _row(table, "cache, after the last pass", main.cache, exact=True)
    for each in main.passes:
        name = "activations, peak" if len(main.passes) == 1 else f"activations of the {each.name}, peak"
        _row(table, name, each.activations)
        table.add_row("  of these, of collectives", size(each.buffers), "", "")
    table.add_section()
    room = run.memory_bytes_per_device
    share = "" if room is None else f"{_part(main.peak / room)} of a device's {size(room)}"
    table.add_row("all together", size(main.peak), "", share)
    return table


def _part(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "< 1%"


def _row(table: Table, name: str, pair: Pair, exact: bool = False) -> None:
    form = "-" if pair.predicted is None else size(pair.predicted)
    table.add_row(name, size(pair.traced), form, _verdict(pair) if exact else _distance(pair))


def _verdict(pair: Pair) -> Text:
    """Of a form that is meant to be exact."""
    return Text() if pair.agrees is None else mark(pair.agrees)


def _distance(pair: Pair) -> Text:
    """Of a form that is an estimate."""
    if pair.agrees is not False or not pair.traced or pair.predicted is None:
        return _verdict(pair)
    difference = pair.predicted / pair.traced - 1
    return mark(True) if abs(difference) < UNSEEN else Text(f"{difference:+.1%}")


def _traffic(each: Pass, main: Traced) -> RenderableType:
    if not each.collectives:
        return Text(f"{_named(each, main)}: nothing moves between ranks.")
    table = columns(f"leaves rank 0 in {_named(each, main)}, bytes", "times", "traced", "closed form", "")
    for name, found in each.collectives.items():
        form = "-" if found.bytes.predicted is None else f"{found.bytes.predicted:,.0f}"
        table.add_row(name, str(found.calls), f"{found.bytes.traced:,.0f}", form, _verdict(found.bytes))
    return table


def _named(each: Pass, main: Traced) -> str:
    return "one step" if len(main.passes) == 1 else f"the {each.name}"


def _work(each: Pass) -> Text:
    flops, form = each.flops.traced, each.flops.predicted
    line = Text(f"{each.name}: {figure(flops / 1e9)} GFLOP in matrix products and attention")
    if form is not None:
        line.append("\nby the closed form " + ("as many " if each.flops.agrees else f"{figure(form / 1e9)} "))
        line.append_text(_distance(each.flops))
    return line


def _times(each: Pass) -> Table:
    table = columns(f"{each.name}, ms", "traced", "planner", "difference")
    form = each.predicted_seconds
    for kind in KINDS:
        pair = Pair(each.kind_s(kind), None if form is None else getattr(form, kind))
        table.add_row(kind, *_ms(pair), _distance(pair))
    table.add_section()
    total = Pair(each.total_s or 0.0, None if form is None else form.total)
    table.add_row("all", *_ms(total), _distance(total))
    return table


def _ms(pair: Pair) -> tuple[str, str]:
    return figure(pair.traced * 1e3), "-" if pair.predicted is None else figure(pair.predicted * 1e3)


def _parts(each: Pass, seconds: Mapping[str, Mapping[str, float]]) -> Table:
    table = columns(f"{each.name}, ms", *KINDS, "all")
    for part in PARTS:
        if kinds := seconds.get(part):
            cells = [figure(kinds[kind] * 1e3) if kind in kinds else "" for kind in KINDS]
            table.add_row(part, *cells, figure(sum(kinds.values()) * 1e3))
    return table


def _side_by_side(run: DryRun) -> Table:
    """The main method and its baselines, in the order in which they were named."""
    names = [each.name for each in run.main.passes]
    times = [f"{name}, ms" for name in names] if run.main.passes[0].seconds is not None else []
    table = columns("method", *times, "GFLOP", "sent", "weights", "peak")
    table.columns[0].min_width = 12
    for each in (run.main, *run.baselines):
        if isinstance(each, Refused):
            table.add_row(each.method.name, Text("cannot run", style="yellow"))
            continue
        spent = [figure((one.total_s or 0.0) * 1e3) for one in each.passes] if times else []
        flops = sum(one.flops.traced for one in each.passes)
        sent = sum(found.bytes.traced for one in each.passes for found in one.collectives.values())
        cells = figure(flops / 1e9), size(sent), size(each.weights.traced), size(each.peak)
        table.add_row(each.method.name, *spent, *cells)
    return table


def _others(run: DryRun) -> list[str]:
    """What rank 0 does not stand for, and what only a baseline has."""
    notes = []
    for found, words in ((run.main.fullest, "has the most weights"), (run.main.busiest, "sends most in a step")):
        if found is not None and found[0] != run.rank:
            notes.append(f"Rank {found[0]} {words}, {size(found[1])} by the closed form.")
    for each in (run.main, *run.baselines):
        if isinstance(each, Refused):
            notes.append(f"{each.method.name} cannot run: {each.error}.")
            continue
        if each.idle_ranks:
            notes.append(f"{each.method.name} leaves {each.idle_ranks:,} ranks idle.")
        if each is not run.main:
            notes += [f"{each.method.name}: {note}" for note in each.notes if note not in run.main.notes]
    return notes


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
