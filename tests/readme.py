"""The scripts of the README and the guides in docs/."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def script(word: str) -> str:
    """The one script of all pages that a word is in."""
    (code,) = (
        each
        for page in PAGES
        for each in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        if word in each
    )
    return code
