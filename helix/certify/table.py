"""A certificate, for people. Readable from 80 columns up."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.certify.cases import Subject
from helix.certify.certificate import Certificate, Check, Row
from helix.config.words import size
from helix.study.table import mark
from helix.study.terminal import Terminal

_TITLES = {"layer": "attention layer", "model": "whole model", "decode": "decoding, prompt / cache"}
_MOST_FAILURES = 5


def show(certificate: Certificate, model: str, console: Console | None = None) -> None:
    """Print a certificate.

    Args:
        model: its name.
    """
    (console or Terminal()).print(render(certificate, model))


def render(certificate: Certificate, model: str) -> RenderableType:
    """The certificate, for any rich console."""
    blank = Text()
    parts: list[RenderableType] = [_headline(certificate, model)]
    for what in _TITLES:
        rows = [row for row in certificate.rows if row.case.what == what]
        if rows:
            parts += [blank, _table(what, rows)]
    parts += [blank, *_notes(certificate), blank, _verdict(certificate)]
    return Group(*parts)


def _headline(certificate: Certificate, model: str) -> Text:
    subject = certificate.subject
    shape, ranks, hosts = subject.shape, len(certificate.hosts), len(set(certificate.hosts))
    device = ", ".join(f"{count} x {name}" for name, count in Counter(certificate.devices).items())
    line = Text()
    line.append(subject.grid.name, style="bold")
    line.append(f"  {subject.grid.m} slices x {subject.grid.n} head groups, ")
    line.append(
        f"{ranks} {certificate.backend} rank{'s' * (ranks > 1)} on {hosts} host{'s' * (hosts > 1)}: {device}\n"
    )
    line.append(f"model {model}: {shape.heads} heads, {shape.kv_heads} KV heads, {shape.head_dim} features")
    line.append("".join(f", {name}" for name in _kinds(subject)))
    line.append(f"\nheld against one device in fp64; batch {subject.batch} x {subject.length} tokens")
    if subject.cut:
        line.append(f"\ncut to what one device holds: {', '.join(subject.cut)}", style="dim")
    return line


def _kinds(subject: Subject) -> list[str]:
    shape, options = subject.shape, subject.options
    found = {
        "RoPE": shape.rope,
        "QK-norm": shape.qk_norm,
        "causal": shape.causal,
        f"{shape.experts} experts": shape.experts > 0,
        "no W_O": options.aggregate == "concat",
        "block projections": options.projection == "block",
        "replicated stream": options.residual == "replicated",
    }
    return [name for name, there in found.items() if there]


def _table(what: str, rows: list[Row]) -> Table:
    """A row a case: error and bound of the worst output and of the worst gradient of any rank."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(_TITLES[what], no_wrap=True, min_width=15)
    table.add_column("", no_wrap=True)
    for name in ("output", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    if what != "decode":
        table.add_column("gradients", justify="right", no_wrap=True)
        table.add_column("bound", justify="right", no_wrap=True)
        table.add_column("worst", overflow="ellipsis", no_wrap=True, max_width=11)
    table.add_column("sent", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    last = None
    for row in rows:
        way = row.case.way.replace(", ", " / ")
        cells: list[Text | str] = [*_pair(row.worst_output)]
        if what != "decode":
            cells += [*_pair(row.worst_gradient), _short(row.worst_gradient)]
        sent = Text(size(row.sent_bytes), style="" if row.bytes_agree else "bold red")
        if last not in (None, way) and len({each.case.precision for each in rows}) > 1:
            table.add_section()
        table.add_row(way if way != last else "", row.case.precision, *cells, sent, mark(row.passed))
        last = way
    return table


def _pair(check: Check | None) -> tuple[Text, str]:
    """An error, red where it is above its bound, and the bound."""
    if check is None:
        return Text("-"), ""
    return Text(f"{check.error:.1e}", style="" if check.passed else "bold red"), f"{check.bound:.0e}"


def _short(check: Check | None) -> str:
    """A gradient's parameter without the block that all have: 1.mlp.up."""
    if check is None:
        return ""
    name = check.tensor.removeprefix("gradient of ").removeprefix("the ").removeprefix("blocks.")
    return name.replace("attention", "attn").removesuffix(".weight")


def _notes(certificate: Certificate) -> list[RenderableType]:
    notes = [
        "error, bound: the largest deviation of any entry on any rank, relative to the largest entry; what rounding "
        "explains (helix/certify/bounds.py). sent: bytes of the rank that sends most; of each collective on each rank "
        "they are the closed forms' where the row passes, and what ranks hold in common is the same to the last bit."
    ]
    if any(row.case.schedule == "perslice" for row in certificate.rows):
        heads, m = certificate.subject.shape.heads, certificate.subject.grid.m
        notes.append(
            f"perslice is another function, and held against that: attention with {heads * m} heads of 1/{m} the "
            "width."
        )
    notes += [f"Not verified: {each}." for each in certificate.omitted]
    return [Text(note, style="dim") for note in notes]


def _verdict(certificate: Certificate) -> Text:
    count, grid = len(certificate.rows), certificate.subject.grid.name
    if certificate.passed:
        return Text.assemble(("✓ ", "green"), f"{grid} is exact here: {count} of {count} cases")
    failed = [row for row in certificate.rows if not row.passed]
    text = Text.assemble(("✗ ", "bold red"), f"{grid} is not exact here: {len(failed)} of {count} cases failed")
    for row in failed[:_MOST_FAILURES]:
        text.append(f"\n  {next(row.failures())}")
    if len(failed) > _MOST_FAILURES:
        text.append(f"\n  and {len(failed) - _MOST_FAILURES} more; --json has all")
    return text
