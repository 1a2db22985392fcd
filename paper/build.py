"""`make paper`: the report of stored results, paper/helix.pdf.

Collects the numbers and tables, checks the text, draws the figures, typesets. `--pages FOLDER` writes each page as a
PNG, to be looked at.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from paper.report.contents import FOLDER, collect
from paper.report.errors import ReportError
from paper.report.typeset import compiled, pages, write_data

MOST_PAGES = 10  # without the appendix


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m paper.build", description="Build paper/helix.pdf.")
    parser.add_argument("--pages", metavar="FOLDER", type=Path, help="write each page as a PNG there, too")
    options = parser.parse_args(argv)
    try:
        build(options.pages)
    except ReportError as error:
        print(f"paper: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def build(images: Path | None = None) -> None:
    """Write paper/helix.pdf, whole or not at all.

    Raises:
        ReportError: if anything of it cannot be made.
    """
    began = time.perf_counter()
    contents = collect()
    content = contents.content()
    print(f"{len(contents.numbers)} numbers, {len(contents.tables)} tables of {len(contents.sources.used)} files")
    write_data(FOLDER, content)
    for name in contents.draw():
        print(f"drawn: {name}")
    (pdf,) = compiled(FOLDER, "pdf")
    text, whole = pages(FOLDER)
    if text > MOST_PAGES:
        raise ReportError(f"the text has {text} pages without the appendix, and may have {MOST_PAGES}")
    draft = FOLDER / "generated/helix.pdf"
    draft.write_bytes(pdf)
    draft.replace(FOLDER / "helix.pdf")
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)
        for place, page in enumerate(compiled(FOLDER, "png", ppi=150), 1):
            (images / f"page_{place:02}.png").write_bytes(page)
    size = len(pdf) / 1e6
    took = time.perf_counter() - began
    print(f"paper/helix.pdf: {text} pages and {whole - text} of appendix, {size:.1f} MB, {took:.0f} s")


if __name__ == "__main__":
    main()
