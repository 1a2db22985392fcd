"""The table at the end of a generation. Readable from 80 columns up."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.config.words import figure, size
from helix.study.between import hosts_line
from helix.study.report import NOT_VERIFIED, Accuracy, Refusal, Report, Traffic
from helix.study.statistics import Summary
from helix.study.table import (
    chosen_line,
    columns,
    mark,
    summaries,
    times_as_fast,
    tracked_line,
    turns_rows,
    turns_table,
)
from helix.study.terminal import Terminal


def show(report: Report, console: Console | None = None) -> None:
    """Print the table of a report."""
    (console or Terminal()).print(render(report))


def render(report: Report) -> RenderableType:
    """The table of a report, for any rich console."""
    blank = Text()
    parts: list[RenderableType] = [_headline(report), blank, _figures(report), blank, _traffic(report), blank]
    parts += [_memory(report), blank, _accuracy(report)]
    if report.baselines:
        parts += [blank, _side_by_side(report), *_notes(report)]
    return Group(*parts, *chosen_line(report.chosen, report.step_ms.mean), *tracked_line(report))


def _headline(report: Report) -> Text:
    method, about = report.method, report.generation
    assert about is not None
    ranks = "1 rank" if report.world_size == 1 else f"{report.world_size} ranks"
    line = Text.assemble((method.name, "bold"), "  ")
    if method.schedule.prefill:
        line.append(f"{method.m} slices x {method.n} head groups, prompt ")
        line.append(method.schedule.prefill, style="bold")
        line.append(", then ")
        line.append(f"{method.schedule.decode}", style="bold")
        line.append(", ")
    line.append(f"{ranks}\nmodel {report.model['name']}, {report.precision}, ")
    line.append(f"{_span(about.prompt_tokens)} tokens and {_span(about.new_tokens)} more")
    if len(about.prompts) > 1:
        line.append(f" of {len(about.prompts)} prompts")
    line.append(f", {len(report.step_ms.runs)} runs, ")
    temperature = about.settings["temperature"]
    line.append(f"temperature {temperature:g}, seed {report.seed}" if temperature else "greedy")
    if report.hosts is not None:
        line.append_text(Text("\n") + hosts_line(report.hosts))
    return line


def _span(counts: object) -> str:
    numbers = list(counts)  # type: ignore[call-overload]
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _figures(report: Report) -> Table:
    rows: list[tuple[str, Summary | None]] = [
        ("time to first token, ms", report.ttft_ms),
        ("time per output token, ms", report.tpot_ms),
        ("tokens/s", report.tokens_per_s),
        ("communication, ms/step", report.comm_ms_per_token),
        ("waiting for ranks, ms/step", report.wait_ms_per_token),
        ("computing, ms/step", report.compute_ms_per_token),
    ]
    if (each := report.collectives) is not None:
        rows += [("one collective, us", each.transfer_us), ("waiting for it, us", each.wait_us)]
    return summaries(rows)


def _traffic(report: Report) -> RenderableType:
    prompt, step = report.prefill_bytes_per_rank, report.comm_bytes_per_rank_per_step
    assert prompt is not None
    if not prompt.executed and not step.executed:
        return Text("Nothing moves between ranks.")
    table = columns("leaves one rank, bytes", "prompt", "", "a token's step", "predicted", "")
    for name in dict.fromkeys([*prompt.executed, *step.executed, *(step.predicted or {})]):
        table.add_row(name, *_pair(prompt, name), f"{step.executed.get(name, 0):,}", *_expected(step, name))
    table.add_section()
    table.add_row("all", *_pair(prompt), f"{sum(step.executed.values()):,}", *_expected(step))
    if report.collectives is None:
        return table
    each = report.collectives
    said = (
        f"{each.per_step} collectives a step, {each.per_layer:g} a layer; a rank is in them for "
        f"{each.share_of_step.mean:.0%} of a recorded step, waiting for others included."
    )
    return Group(table, Text(), Text(said))


def _pair(traffic: Traffic, name: str | None = None) -> tuple[str | Text, ...]:
    """What was counted, and whether the closed form agrees."""
    executed = sum(traffic.executed.values()) if name is None else traffic.executed.get(name, 0)
    return f"{executed:,}", _expected(traffic, name)[1]


def _expected(traffic: Traffic, name: str | None = None) -> tuple[str | Text, ...]:
    if traffic.predicted is None:
        return "-", ""
    if name is None:
        return f"{sum(traffic.predicted.values()):,}", mark(traffic.agrees)
    predicted = traffic.predicted.get(name, 0)
    return f"{predicted:,}", mark(traffic.executed.get(name, 0) == predicted)


def _memory(report: Report) -> Table:
    memory = report.memory_bytes_per_rank
    table = columns("memory of one rank", "measured", "predicted")
    for name, measured, predicted in (
        ("weights", memory.weights, memory.predicted),
        ("KV cache", memory.kv_cache, memory.kv_cache_predicted),
        ("activations, peak", memory.activations_peak, None),
        ("all together", memory.peak, None),
    ):
        table.add_row(name, size(measured), "" if predicted is None else size(predicted))
    return table


def _accuracy(report: Report) -> Text:
    accuracy = report.accuracy
    if accuracy.reference == NOT_VERIFIED:
        return Text("Not compared with transformers in one process (generate.verify=false).")
    line = Text("Every token")
    if not accuracy.tokens_equal:
        line = Text.assemble(("Not every token", "bold red"))
    line.append(" is the one that transformers alone gives in one process; relative error of the logits ")
    line.append(f"{accuracy.relative_error:.1e}.")
    if not accuracy.tokens_equal:
        line.append(f" {_differing(accuracy)}")
    return line


def _differing(accuracy: Accuracy) -> str:
    which = accuracy.differing_prompts or ()
    prompts = "The answer differs" if which == (1,) else f"Prompt {', '.join(map(str, which))} differ"
    return f"{prompts} from token {accuracy.first_difference} on."


def _side_by_side(report: Report) -> Table:
    """The main method and its baselines, which took turns with it, in the order in which they were named."""
    main = report.method.name
    table = turns_table(report, 10, "TTFT ms", "TPOT ms", f"{main} is x", "p", "weights", "tokens")
    for each, paired in turns_rows(report):
        if isinstance(each, Refusal):
            table.add_row(each.method.name, "", "", Text("did not run", style="yellow"))
            continue
        ratio = p = ""
        if paired is not None:
            ratio, p = times_as_fast(paired), f"{paired.p:.1g}"
        ttft, tpot = ("-" if one is None else figure(one.mean) for one in (each.ttft_ms, each.tpot_ms))
        equal = {True: "equal", False: "differ", None: "-"}[each.accuracy.tokens_equal]
        table.add_row(each.method.name, ttft, tpot, ratio, p, size(each.memory_bytes_per_rank.weights), equal)
    return table


def _notes(report: Report) -> list[RenderableType]:
    runs = len(report.step_ms.runs)
    notes = [
        f"x: how many times as fast as this row {report.method.name} is in time per output token, with 95 % interval "
        f"and p of a paired t-test over {runs} runs. weights: bytes of one rank. tokens: against transformers alone."
    ]
    for each in report.baselines:
        if isinstance(each, Refusal):
            notes.append(f"{each.method.name} did not run: {each.error}")
            continue
        if each.paired_ttft is not None:
            notes.append(
                f"To the first token {report.method.name} is {times_as_fast(each.paired_ttft)} times as fast as "
                f"{each.method.name}."
            )
        if each.idle_ranks:
            notes.append(f"{each.method.name} leaves {each.idle_ranks} of {report.world_size} ranks idle.")
    return [Text(note, style="dim") for note in notes]
