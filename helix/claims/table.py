"""The ledger, for people: rows as plain data, counts, tables for a terminal and for README.

`rows` and `counts` are what notebooks and the paper take; everything in a row is text that can be printed.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.claims.ledger import INCONSISTENT, NOT_REPRODUCED, REPRODUCED, UNTESTABLE, VERDICTS, Claim, Ledger
from helix.claims.resolve import Found, found, outcome
from helix.claims.words import filled, said, shown

ALL = "all"
# A verdict's sign where a column is narrow, and its colour.
SIGNS = {
    REPRODUCED: ("✓", "green"),
    NOT_REPRODUCED: ("✗", "red"),
    INCONSISTENT: ("≠", "magenta"),
    UNTESTABLE: ("?", "yellow"),
}


# How a quote is shown, by its form: what is put together of a table or transliterated is no quotation.
_FORMS = {"verbatim": '"{}"', "cells": "{} (cells of a table)", "formula": "{} (a formula, transliterated)"}


@dataclass(frozen=True)
class Row:
    """A claim with everything resolved to text; `found` has the numbers.

    Args:
        quoted: the quote in quotation marks, if it is verbatim; else with a word on what it is.
        stated: the paper's figure, or nothing.
        ours: our figures, joined by semicolons; or nothing.
        arithmetic: what the executable check says; or nothing.
        hard: why the verdict was hard to decide; or nothing.
    """

    id: str
    paper: str
    section: str
    quote: str
    quoted: str
    stated: str
    verdict: str
    ours: str
    found: tuple[Found, ...]
    why: str
    arithmetic: str
    evidence: tuple[str, ...]
    hard: str


def rows(ledger: Ledger, verdict: str | None = None, paper: str | None = None) -> list[Row]:
    """The claims, in the ledger's order; of one verdict or one paper, if given.

    Raises:
        ConfigError: naming the claim, if a figure is not where the ledger says.
    """
    return [
        row(ledger, claim)
        for claim in ledger.claims
        if verdict in (None, claim.verdict) and paper in (None, claim.paper)
    ]


def telling(ledger: Ledger) -> list[Row]:
    """The claims that say most, by verdict."""
    found = [row(ledger, claim) for claim in ledger.claims if claim.telling]
    return sorted(found, key=lambda one: VERDICTS.index(one.verdict))


def hardest(ledger: Ledger) -> list[Row]:
    """The claims that were hardest to decide."""
    return [row(ledger, claim) for claim in ledger.claims if claim.hard]


def row(ledger: Ledger, claim: Claim) -> Row:
    """One claim."""
    ours, checked = found(ledger, claim), outcome(claim)
    return Row(
        id=claim.id,
        paper=claim.paper,
        section=claim.section,
        quote=" ".join(claim.quote.split()),
        quoted=_FORMS[claim.form].format(" ".join(claim.quote.split())),
        stated=shown(claim.value.figure, claim.value.unit) if claim.value else "",
        verdict=claim.verdict,
        ours="; ".join(said(one) for one in ours),
        found=ours,
        why=filled(claim.why, ours),
        arithmetic=checked.words if checked else "",
        evidence=(*(each.words for each in claim.evidence), *([f"check {claim.check.name}"] if claim.check else [])),
        hard=filled(claim.hard, ours),
    )


def counts(ledger: Ledger) -> dict[str, dict[str, int]]:
    """How many claims have each verdict, in each paper and in all: counts["reproduced"]["full"]; both have "all"."""
    papers = (*ledger.papers, ALL)
    table = {verdict: dict.fromkeys(papers, 0) for verdict in (*VERDICTS, ALL)}
    for claim in ledger.claims:
        for verdict in (claim.verdict, ALL):
            for paper in (claim.paper, ALL):
                table[verdict][paper] += 1
    return table


def render(ledger: Ledger, verdict: str | None = None, paper: str | None = None) -> RenderableType:
    """Counts and the table, readable from 80 columns up."""
    parts: list[RenderableType] = [_counted(ledger), Text()]
    shown_rows = rows(ledger, verdict, paper)
    for name, about in ledger.papers.items():
        own = [one for one in shown_rows if one.paper == name]
        if own:
            title = Text(f"{name}  ", style="bold")
            title.append(f"{about.title}; {about.setting}", style="not bold dim")
            parts += [title, _claims(own), Text()]
    if verdict is None and paper is None:
        parts += [Text("hardest to decide", style="bold")]
        parts += [Text.assemble((f"{one.id}: ", "bold"), one.hard) for one in hardest(ledger)] + [Text()]
    words = (
        "python -m helix claims --id ID shows one with its arithmetic and evidence; --check holds all against them."
    )
    return Group(*parts, Text(words, style="dim"))


def render_one(ledger: Ledger, name: str) -> RenderableType:
    """One claim in full.

    Raises:
        ConfigError: if there is none of that id.
    """
    one = row(ledger, ledger[name])
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    mark, colour = SIGNS[one.verdict]
    words: list[tuple[str, RenderableType]] = [
        ("paper", Text(f"{one.paper}: {ledger.papers[one.paper].title}; {one.section}")),
        ("quote", Text(one.quoted)),
        ("states", Text(one.stated)),
        ("verdict", Text(f"{mark} {one.verdict}", style=colour)),
        ("why", Text(one.why)),
        ("arithmetic", Text(one.arithmetic)),
        ("ours", Text("\n".join(said(each) for each in one.found))),
        ("evidence", Text("\n".join(one.evidence))),
        ("hard", Text(one.hard)),
    ]
    for key, text in words:
        if isinstance(text, Text) and text.plain:
            table.add_row(key, text)
    return Group(Text(one.id, style="bold"), table)


def _counted(ledger: Ledger) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("claims")
    for column in (*ledger.papers, ALL):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict, numbers in counts(ledger).items():
        mark, colour = SIGNS.get(verdict, (" ", "default"))
        table.add_row(Text(f"{mark} {verdict}", style=colour), *map(str, numbers.values()))
    return table


def _claims(own: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_lines=False)
    table.add_column("", width=1)
    table.add_column("claim", overflow="fold", ratio=5)
    table.add_column("found", overflow="fold", ratio=4)
    for one in own:
        mark, colour = SIGNS[one.verdict]
        claim = Text.assemble((one.id, "bold"), "\n", (one.quoted, "dim"))
        table.add_row(Text(mark, style=colour), claim, Text("\n".join(said(each) for each in one.found) or one.why))
    return table
