"""Checks of the text: no digit is typed, every name has a number, every number has a place.

What may hold digits in a .typ file: comments, labels, references and citations; arguments of code; names, which begin
with a letter (FP32, H100, helix_4x4, SmolLM2-135M); lengths of layout (6pt, 1fr); and within a formula that has a
letter, the constants 0, 1, 2 and 4. All else is a number, and numbers have names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from paper.report.errors import ReportError

_COMMENT = re.compile(r"(?<!:)//.*")
_NAMED = re.compile(r"#?\bn\(\s*\"([^\"]+)\"\s*\)")
_TABLED = re.compile(r"\b(?:tabled|made)\(\s*\"([^\"]+)\"")
_PICTURED = re.compile(r"\b(?:pictured|drawn)\(\s*\"([^\"]+)\"")
_CITED = re.compile(r"@([A-Za-z][\w-]*)|#cite\(<([\w-]+)>")
_LABEL = re.compile(r"<[A-Za-z][\w-]*>|@[A-Za-z][\w-]*")
_HEADING = re.compile(r"^= .*|^== .*", re.MULTILINE)
# What a name may look like: it begins with a letter.
_NAME = re.compile(r"(?<![\w.])[A-Za-z][\w/-]*(?:\.[A-Za-z][\w-]*)*")
_CODE = re.compile(
    r"#(?:import|include|show|set|counter)\b.*|\bfr\([^)]*\)|\b(?:form|style|kind|supplement): *\"[^\"]*\""
)
_LENGTH = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:pt|em|fr|mm)\b")
_FORMULA = re.compile(r"\$([^$]*)\$")
_CONSTANT = re.compile(r"(?<![\d.])[0124](?![\d.%])")
_DIGIT = re.compile(r"\d")


@dataclass(frozen=True)
class Text:
    """One file of the report's text."""

    path: Path
    content: str

    @property
    def code_free(self) -> str:
        return _COMMENT.sub("", self.content)

    def numbers(self) -> list[str]:
        return _NAMED.findall(self.code_free)

    def tables(self) -> list[str]:
        return _TABLED.findall(self.code_free)

    def figures(self) -> list[str]:
        return _PICTURED.findall(self.code_free)

    def references(self) -> list[str]:
        """Labels and citations that it refers to."""
        return [first or second for first, second in _CITED.findall(self.code_free)]

    def typed_digits(self) -> Iterator[tuple[int, str]]:
        """Line and text of every digit that stands for a number."""
        text = self.code_free
        for pattern in (_NAMED, _TABLED, _PICTURED, _LABEL, _CODE, _LENGTH):
            text = pattern.sub(_blank, text)
        text = _FORMULA.sub(lambda found: _formula(found.group(0)), text)
        text = _NAME.sub(_blank, text)
        for number, line in enumerate(text.splitlines(), 1):
            if _DIGIT.search(line):
                yield number, self.content.splitlines()[number - 1].strip()


def _blank(found: re.Match[str]) -> str:
    """As many lines of nothing."""
    return " " + "\n" * found.group(0).count("\n")


def _formula(text: str) -> str:
    """A formula without its constants and symbols; unchanged if it has no letter, since it is a number then."""
    if not re.search(r"[A-Za-z]", text):
        return text
    return _NAME.sub(_blank, _CONSTANT.sub(" ", text))


def texts(folder: Path) -> list[Text]:
    """The report's text; of the template, which has lengths and no prose, the names alone are read."""
    files = [folder / "helix.typ", *sorted((folder / "sections").glob("*.typ"))]
    return [Text(path, path.read_text()) for path in files]


def check_digits(found: Iterable[Text]) -> None:
    """Raises ReportError if a digit is typed."""
    for text in found:
        for line, words in text.typed_digits():
            raise ReportError(
                f"{text.path.name}, line {line}, has a digit typed into the text, where numbers have names: {words}"
            )


def check_names(found: Iterable[Text], made: Mapping[str, Iterable[str]]) -> None:
    """Each name of a number, table or figure is made, and each that is made has a place.

    Args:
        made: "numbers", "tables" and "figures", to their names.

    Raises:
        ReportError: naming the first that is not so.
    """
    found = list(found)
    for kind, names in made.items():
        known, used = set(names), {name for text in found for name in getattr(text, kind)()}
        if unknown := sorted(used - known):
            raise ReportError(f"the text has {kind} that nothing makes: {', '.join(unknown)}")
        if unused := sorted(known - used):
            raise ReportError(f"these {kind} are made and stand nowhere in the text: {', '.join(unused)}")


def bibliography(folder: Path) -> set[str]:
    """The keys of references.bib."""
    return set(re.findall(r"^@\w+\{([\w-]+),", (folder / "references.bib").read_text(), re.MULTILINE))


def check_citations(found: Iterable[Text], folder: Path) -> None:
    """Each reference is a label or in the bibliography, and each entry of that is cited.

    Raises:
        ReportError: naming the first that is not so.
    """
    found = list(found)
    labels = {name for text in found for name in re.findall(r"<([A-Za-z][\w-]*)>(?!,)", text.code_free)}
    keys, used = bibliography(folder), {name for text in found for name in text.references()}
    if missing := sorted(used - keys - labels):
        raise ReportError(f"the text refers to what is neither a label nor in references.bib: {', '.join(missing)}")
    if uncited := sorted(keys - used):
        raise ReportError(f"references.bib has entries that the text does not cite: {', '.join(uncited)}")
