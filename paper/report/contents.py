"""All that the text refers to, collected and checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from helix.config.schema import ConfigError
from helix.figures.style import save
from paper.report import formulas, measured, modelled, prose, said, tables, words
from paper.report.drawings import DRAWN, MADE_OF
from paper.report.errors import ReportError
from paper.report.sources import ROOT, Sources
from paper.report.typeset import digest

FOLDER = ROOT / "paper"


@dataclass(frozen=True)
class Contents:
    """Numbers and tables by their names, of the results that `sources` read."""

    sources: Sources
    numbers: dict[str, str]
    tables: dict[str, list[list[str]]]

    def content(self) -> dict[str, Any]:
        """What the text reads: dated by the newest result, so that it is the same on any day."""
        newest = date.fromisoformat(self.sources.days()[-1])
        content: dict[str, Any] = {
            "numbers": self.numbers,
            "tables": self.tables,
            "equations": formulas.equations(),
            "figures": sorted(DRAWN),
            "date": {"year": newest.year, "month": newest.month, "day": newest.day},
            "made": f"{newest.day} {newest:%B} {newest.year}",
        }
        return content | {"keywords": ["attention", "model parallelism", f"inputs-{self.digest(content)}"]}

    def digest(self, content: dict[str, Any]) -> str:
        drawn = {_result(self.sources, name) for names in MADE_OF.values() for name in names}
        return digest(FOLDER, content, sorted(drawn))

    def draw(self) -> Iterator[str]:
        """Each figure into paper/generated, by its name."""
        for name, figure in DRAWN.items():
            save(figure(self.sources), FOLDER / f"generated/{name}.pdf")
            yield name


def collect(sources: Sources | None = None) -> Contents:
    """Everything but the figures' drawings.

    Raises:
        ReportError: if a result or a name is missing, a number has no place, or a digit is typed.
    """
    sources = sources or Sources()
    found = prose.texts(FOLDER)
    prose.check_digits(found)
    prose.check_citations(found, FOLDER)
    said.check(sources)
    try:
        made = tables.tables(sources)
        numbers = measured.numbers(sources) | modelled.numbers(sources) | tables.headers(sources)
    except (ConfigError, KeyError) as error:
        raise ReportError(f"a result lacks what the text refers to: {error}") from error
    for names in MADE_OF.values():
        for name in names:
            sources.used.add(_result(sources, name))
    numbers |= {
        "results.files": words.figure(len([path for path in sources.used if path.parent.name == "results"])),
        "results.dirty": str(sources.count_dirty()),
        "results.days": words.listed(sources.days()),
    }
    prose.check_names(found, {"numbers": numbers, "tables": made, "figures": DRAWN})
    return Contents(sources, numbers, made)


def _result(sources: Sources, name: str) -> Path:
    try:
        return sources.path(name, ".json")
    except ReportError:
        return sources.path(name, ".csv")
