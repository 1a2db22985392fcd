"""Typesetting: generated data and figures beside the text, the PDF, and the digest of what it was made of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import typst

from paper.report.errors import ReportError

_DIGEST = re.compile(rb"inputs-([0-9a-f]{64})")


def digest(folder: Path, content: Mapping[str, Any], results: list[Path]) -> str:
    """Of all that the PDF is made of: text, template, bibliography, numbers, tables, and the results that are drawn.

    The code that draws is not in it, so that a change of style alone does not make a stored PDF stale.
    """
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    texts = [*sorted(folder.glob("*.typ")), *sorted((folder / "sections").glob("*.typ")), folder / "references.bib"]
    for path in [*texts, *sorted(results)]:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def stored_digest(pdf: Path) -> str | None:
    """The digest that a PDF carries among its keywords."""
    found = _DIGEST.search(pdf.read_bytes())
    return found.group(1).decode() if found else None


def write_data(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / "generated").mkdir(exist_ok=True)
    (folder / "generated/data.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def compiled(folder: Path, form: Literal["pdf", "png"], ppi: float | None = None) -> list[bytes]:
    """The report as a PDF, or its pages as PNG.

    Raises:
        ReportError: what typst says, an unresolved label, a missing reference or a warning (an unknown font) included.
    """
    compiler = typst.Compiler(str(folder / "helix.typ"), root=str(folder), ignore_system_fonts=True)
    try:
        made, warnings = compiler.compile_with_warnings(format=form, ppi=ppi)
    except typst.TypstError as error:
        where = [line.strip() for line in error.diagnostic.splitlines() if "-->" in line or "┌─" in line]
        raise ReportError(f"typst: {error.message} {where[0] if where else ''}".rstrip()) from None
    if warnings:
        raise ReportError(f"typst warns: {warnings[0].message}")
    assert made is not None
    return made if isinstance(made, list) else [made]


def pages(folder: Path) -> tuple[int, int]:
    """How many pages the text has, and how many all of it with the appendix."""
    compiler = typst.Compiler(str(folder / "helix.typ"), root=str(folder), ignore_system_fonts=True)
    text, whole = (json.loads(compiler.query(f"<{name}>", field="value", one=True)) for name in ("text_end", "end"))
    return text, whole
