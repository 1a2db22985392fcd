"""What README and docs/claims.md say of the papers' claims, between markers that `helix claims --update` finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helix.claims.ledger import INCONSISTENT, NOT_REPRODUCED, REPRODUCED, UNTESTABLE, VERDICTS, Ledger
from helix.claims.table import ALL, Row, counts, hardest, rows, telling
from helix.claims.words import said
from helix.config.schema import ConfigError

BEGIN = "<!-- claims: what follows is written by python -m helix claims --update README.md -->"
BEGIN_ALL = "<!-- all claims: what follows is written by python -m helix claims --update docs/claims.md -->"
END = "<!-- end of claims -->"


def markdown(ledger: Ledger) -> str:
    """README's section: prose, counts, and the most telling claims."""
    table = counts(ledger)
    total, papers = table[ALL][ALL], len(ledger.papers)
    parts = [
        f"Helix comes from {_number(papers)} papers by others. `paper/claims.yaml` holds {total} claims of theirs, "
        "each with a verdict and what shows it: a test, a run, or its own arithmetic as a function that runs. "
        f"{table[REPRODUCED][ALL]} are reproduced, nearly all of them on how the method cuts a model; "
        f"{table[NOT_REPRODUCED][ALL]} were tried and did not hold; {table[INCONSISTENT][ALL]} are contradicted by "
        "the papers' own words or figures, or by the data sheet of what they name; "
        f"{table[UNTESTABLE][ALL]} cannot be tested here, most for want of their 16 H100s, and have a modelled figure "
        "at most. Times on CPU ranks decide nothing.",
        _counted(ledger),
        _table(("the papers' words", "verdict", "why", "found"), [_told(row) for row in telling(ledger)]),
        f"[All {total}, and the hardest to decide](docs/claims.md). `python -m helix claims` shows them on a "
        "terminal, `--id full-cohens-d` one with its arithmetic and evidence, `--check` holds every one against its "
        "files, tests and sums.",
    ]
    return "\n\n".join(parts)


def in_full(ledger: Ledger) -> str:
    """The section of docs/claims.md: every claim, paper by paper, and the hardest to decide."""
    hard = "\n".join(f"- `{row.id}` ({row.verdict}): {_plain(row.hard)}" for row in hardest(ledger))
    return "\n\n".join(
        [*(_of_paper(ledger, name) for name in ledger.papers), f"## The hardest to decide, and why\n\n{hard}"]
    )


def update(ledger: Ledger, text: str, path: Path) -> str:
    """A text with what is between its markers, of README's section or of the claims in full, written anew.

    Raises:
        ConfigError: if it does not have a begin and the end, each once, in order.
    """
    for begin, write in ((BEGIN, markdown), (BEGIN_ALL, in_full)):
        if text.count(begin) == text.count(END) == 1 and text.index(begin) < text.index(END):
            before, after = text.split(begin)[0], text.split(END)[1]
            return f"{before}{begin}\n\n{write(ledger)}\n\n{END}{after}"
    raise ConfigError(f"{path} has no two lines '{BEGIN}' (or '{BEGIN_ALL}') and '{END}', each once, to write between")


def _counted(ledger: Ledger) -> str:
    found = counts(ledger)
    body = [[verdict, *map(str, found[verdict].values())] for verdict in (*VERDICTS, ALL)]
    return _table(("", *ledger.papers, ALL), body)


def _of_paper(ledger: Ledger, name: str) -> str:
    about = ledger.papers[name]
    body = [(f"`{row.id}`", _plain(row.quoted), row.verdict, _found(row)) for row in rows(ledger, paper=name)]
    return f"## {name}: {about.title}\n\n{about.setting}\n\n" + _table(("id", "claim", "verdict", "found"), body)


def _told(row: Row) -> tuple[str, ...]:
    figures = "<br>".join(_plain(said(one)) for one in row.found)
    return f"{_plain(row.quoted)} (`{row.id}`)", row.verdict, _plain(row.why), figures


def _found(row: Row) -> str:
    return _plain(row.ours or row.why)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that no Markdown reads as its own signs."""
    for sign in "|*_<~":
        text = text.replace(sign, f"\\{sign}")
    return text


def _number(count: int) -> str:
    return {1: "one", 2: "two", 3: "three"}.get(count, str(count))
