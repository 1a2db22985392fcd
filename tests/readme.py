"""The README's scripts."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def script(word: str) -> str:
    """The one script of the README that a word is in."""
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if word in each)
    return code
