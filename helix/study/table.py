"""The table at the end of a run: a report, for people. Readable from 80 columns up."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from helix.config.words import figure, size
from helix.planner.chosen import Chosen, compared
from helix.study.between import hosts_line, other_placements
from helix.study.report import Measurement, Refusal, Report, Rival
from helix.study.statistics import Paired, Summary
from helix.study.terminal import Terminal
from helix.study.traffic import Traffic

_REFERENCES = {
    "mha_fp32_single": "the same model on one device in FP32",
    "mha_narrow_heads": "attention with heads x m narrow heads, on one device in FP32",
    "own_model_single": "its own model on one device",
}


def show(report: Report, console: Console | None = None) -> None:
    """Print the table of a report."""
    (console or Terminal()).print(render(report))


def render(report: Report) -> RenderableType:
    """The table of a report, for any rich console."""
    blank = Text()
    parts: list[RenderableType] = [_headline(report), blank, _figures(report), blank, _traffic(report), blank]
    parts += [_memory(report), blank, _accuracy(report)]
    if report.accuracy.relative_error_to_h_heads is not None:
        parts.append(_perslice_notice(report, report.accuracy.relative_error_to_h_heads))
    if report.baselines:
        parts += [blank, _side_by_side(report), *_notes(report)]
    return Group(*parts, *chosen_line(report.chosen, report.step_ms.mean), *tracked_line(report))


def chosen_line(chosen: Chosen | None, measured_ms: float) -> list[Text]:
    """What `parallel=auto` had predicted of a step, beside what was measured."""
    return [] if chosen is None else [Text(), Text(compared(chosen, measured_ms))]


def tracked_line(report: Report) -> list[Text]:
    """Where the W&B run is, if there is one. The path is what one copies: never broken by a line's end."""
    if report.wandb is None or report.wandb.path is None:
        return []
    said = f"W&B ({report.wandb.mode}): {report.wandb.path}"
    return [Text(said, style="dim", no_wrap=True, overflow="fold")]


def _headline(report: Report) -> Text:
    method, workload = report.method, report.workload
    schedule = " / ".join(name for name in (method.schedule.prefill, method.schedule.decode) if name)
    ranks = "1 rank" if report.world_size == 1 else f"{report.world_size} ranks"
    line = Text()
    line.append(method.name, style="bold")
    line.append("  ")
    if schedule:
        line.append(f"{method.m} slices x {method.n} head groups, schedule ")
        line.append(schedule, style="bold")
        line.append(", ")
    line.append(f"{ranks}\n")
    line.append(f"model {report.model['name']}, {report.precision}, ")
    line.append(f"batch {workload['batch_size']} x {workload['seq_len']} tokens, ")
    line.append(f"{len(report.tokens_per_s.runs)} runs of {workload['iterations']} steps, seed {report.seed}")
    if report.hosts is not None:
        line.append_text(Text("\n") + hosts_line(report.hosts))
    if report.checkpoint is not None:
        line.append(f"\nweights after {report.checkpoint.step} steps of training: {report.checkpoint.path}")
    return line


def columns(*names: str) -> Table:
    """A table whose first column is words and whose others are numbers, one below the other."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(names[0], overflow="fold", min_width=24)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _figures(report: Report) -> Table:
    return summaries(
        [
            ("tokens/s", report.tokens_per_s),
            ("step, ms", report.step_ms),
            ("communication, ms/token", report.comm_ms_per_token),
            ("waiting for ranks, ms/token", report.wait_ms_per_token),
            ("computing, ms/token", report.compute_ms_per_token),
        ]
    )


def summaries(rows: Sequence[tuple[str, Summary | None]]) -> Table:
    """Figures over runs, those that there are."""
    table = columns("over runs", "mean", "95 % interval", "sd", "CV")
    for name, summary in rows:
        if summary is not None:
            low, high = summary.ci95
            cv = "-" if summary.cv is None else f"{summary.cv:.1%}"
            interval = f"{figure(low)} .. {figure(high)}"
            table.add_row(name, figure(summary.mean), interval, figure(summary.sd), cv)
    return table


def _traffic(report: Report) -> RenderableType:
    table = traffic_table(
        "leaves one rank in one step, bytes", report.comm_bytes_per_rank_per_step, "Nothing moves between ranks."
    )
    if report.between_hosts is None:
        return table
    between = report.between_hosts
    assert report.hosts is not None
    crosses = traffic_table("crosses hosts in one step, bytes of all ranks", between, "Nothing crosses hosts.")
    parts = [table, Text(), crosses]
    if (said := other_placements(report.hosts.placement, between)) is not None:
        parts.append(said)
    return Group(*parts)


def traffic_table(what: str, traffic: Traffic, nothing: str) -> RenderableType:
    """Bytes by collective, and whether the closed forms agree; or the sentence that there are none."""
    executed, predicted = traffic.executed, traffic.predicted or {}
    names = list(dict.fromkeys([*predicted, *executed]))
    if not names:
        return Text(nothing)
    table = columns(what, "executed", "predicted", "")
    if traffic.predicted is None:  # no closed form
        for name in names:
            table.add_row(name, f"{executed[name]:,}", "-", "")
        return table
    for name in names:
        pair = executed.get(name, 0), predicted.get(name, 0)
        table.add_row(name, *(f"{count:,}" for count in pair), mark(pair[0] == pair[1]))
    table.add_section()
    totals = sum(executed.values()), sum(predicted.values())
    table.add_row("all", *(f"{count:,}" for count in totals), mark(traffic.agrees))
    return table


def _memory(report: Report) -> Table:
    memory = report.memory_bytes_per_rank
    table = columns("memory of one rank", "measured", "predicted")
    table.add_row("weights", size(memory.weights), "" if memory.predicted is None else size(memory.predicted))
    table.add_row("activations, peak", size(memory.activations_peak), "")
    table.add_row("both together", size(memory.peak), "")
    return table


def _accuracy(report: Report) -> Text:
    accuracy = report.accuracy
    reference = _REFERENCES.get(accuracy.reference, accuracy.reference)
    return Text.assemble("Relative error ", (f"{accuracy.relative_error:.1e}", "bold"), f" against {reference}.")


def turns_table(report: Report, least: int, *names: str) -> Table:
    """A table with a row for each method that took turns, whose names are never broken; the first is `least` wide."""
    table = columns("taking turns", *names)
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(least, *(len(each.method.name) for each in (report, *report.baselines)))
    table.padding = (0, 1, 0, 0)  # closer than the others: seven columns in 80
    return table


def turns_rows(report: Report) -> list[tuple[Measurement | Refusal, Paired | None]]:
    """The main method and each of its baselines, with what the main one is in comparison."""
    rows: list[tuple[Measurement | Refusal, Paired | None]] = [(report, None)]
    return rows + [(each, each.paired if isinstance(each, Rival) else None) for each in report.baselines]


def _side_by_side(report: Report) -> Table:
    """The main method and its baselines, which took turns with it, in the order in which they were named."""
    main = report.method.name
    table = turns_table(report, 12, "tokens/s", f"{main} is x", "p", "weights", "sent", "error")
    for each, paired in turns_rows(report):
        if isinstance(each, Refusal):
            table.add_row(each.method.name, "", Text("did not run", style="yellow"))
            continue
        ratio = p = ""
        if paired is not None:
            ratio, p = times_as_fast(paired), f"{paired.p:.1g}"
        sent = size(sum(each.comm_bytes_per_rank_per_step.executed.values()))
        cells = (figure(each.tokens_per_s.mean), ratio, p, size(each.memory_bytes_per_rank.weights), sent)
        table.add_row(each.method.name, *cells, f"{each.accuracy.relative_error:.0e}")
    return table


def _notes(report: Report) -> list[RenderableType]:
    """What the columns hold, and what only some rows have."""
    runs = len(report.step_ms.runs)
    notes = [
        f"x: how many times as fast as this row {report.method.name} is, with 95 % interval and p of a paired t-test "
        f"over {runs} runs. weights, sent: bytes of one rank, the latter in a step."
    ]
    floors = [each.paired.minimum_detectable_ratio for each in report.baselines if isinstance(each, Rival)]
    if floors:
        notes.append(f"With this scatter ratios from {max(floors):.2f} on would be found in 8 of 10 such experiments.")
    for each in (report, *report.baselines):
        if isinstance(each, Refusal):
            notes.append(f"{each.method.name} did not run: {each.error}")
            continue
        if each.idle_ranks:
            notes.append(f"{each.method.name} leaves {each.idle_ranks} of {report.world_size} ranks idle.")
        if each.bubble is not None:
            measured = "" if each.bubble.measured is None else f", measured {each.bubble.measured:.0%}"
            notes.append(f"{each.method.name}: pipeline bubble {each.bubble.predicted:.0%} by its form{measured}.")
        distance = each.accuracy.relative_error_to_h_heads
        if distance is not None and each is not report:
            notes.append(
                f"{each.method.name} computes another function: its error is against attention with narrow heads, and "
                f"{distance:.0%} against the attention with {report.model['heads']} heads."
            )
        if each.accuracy.reference == "own_model_single":
            notes.append(f"{each.method.name} runs a model of its own, and its error is against that.")
    return [Text(note, style="dim") for note in notes]


def _perslice_notice(report: Report, distance: float) -> Panel:
    heads, m = report.model["heads"], report.method.m
    text = Text.assemble(
        f"perslice is not the attention with {heads} heads. It computes attention with {heads * m} heads of 1/{m} the "
        "width, and the relative error above is against that. Its output differs from the attention with "
        f"{heads} heads and the same weights by ",
        (f"{distance:.0%}", "bold"),
        " (relative error). For weights trained with that attention, choose any other schedule.",
    )
    return Panel(text, title="A different function", title_align="left", border_style="yellow")


def mark(agrees: bool) -> Text:
    """Whether two figures agree."""
    return Text("✓", style="green") if agrees else Text("✗ differ", style="bold red")


def times_as_fast(paired: Paired) -> str:
    """A ratio with its 95 % interval, whose ends may be far apart where few runs scatter."""
    ratio, low, high = (f"{each:.2f}" if abs(each) < 999.5 else f"{each:.3g}" for each in (paired.ratio, *paired.ci95))
    return f"{ratio} ({low}..{high})"
