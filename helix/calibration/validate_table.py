"""Predicted against measured, for people. Readable from 80 columns up."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.calibration.outcomes import WITHIN, Validation
from helix.config.words import figure, size


def render(found: Validation) -> RenderableType:
    """Every layout's step and memory, case by case; then how the planner did."""
    parts: list[RenderableType] = []
    for case, group in groupby(found.outcomes, lambda one: one.case):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(case, min_width=30)
        for column in ("predicted", "measured, ms", "error", "memory", "measured", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for one in group:
            times = figure(one.predicted_ms), figure(one.measured_ms), f"{one.error:+.0%}"
            traced = "" if one.traced_bytes is None else size(one.traced_bytes)
            off = "" if one.memory_error is None else f"{one.memory_error:+.0%}"
            memory = traced, size(one.measured_bytes), off
            table.add_row(one.layout + ("" if one.bytes_agree else "  ✗ bytes"), *times, *memory)
        parts += [table, Text()]
    return Group(*parts, _summary(found))


def _summary(found: Validation) -> Text:
    good, choices = [one for one in found.choices if one.good], found.choices
    out = Text()
    out.append(f"{found.hardware}: {len(found.outcomes)} layouts of {len(choices)} cases\n", style="bold")
    out.append(f"Kendall's tau of step times {found.tau:.2f} ({found.tau_within:.2f} within a case), ")
    out.append(f"median error {found.error:.0%}; ")
    out.append(f"memory's by a dry run {found.memory_error:.0%}, by the closed form {found.estimate_error:.0%}; ")
    out.append("every rank sent the bytes that were predicted.\n" if found.bytes_agree else "bytes differ.\n")
    out.append(f"The planner's choice was within {WITHIN:.0%} of the best measured layout in {len(good)} of ")
    out.append(f"{len(choices)} cases.")
    for one in choices:
        if not one.good:
            out.append(f"\n{one.case}: {one.chosen} took {one.times_best:.2f} times as long as {one.best}.", "yellow")
    return out
