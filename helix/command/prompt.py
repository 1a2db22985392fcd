"""`prompt=` and `model.path=` as people type them: texts, not values of Hydra's grammar.

Hydra reads a comma as a sweep, and stops at an exclamation mark, an apostrophe, a letter with an accent or an equals
sign. So a prompt that the grammar cannot read, or reads as something else than a text, is quoted here before Hydra
sees it. What stays Hydra's: a list in brackets, a text in quotes, null, and in a sweep (-m) what
stands between commas. A path is quoted where the grammar cannot read it, such as one that begins with ~.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

_KEY, _PATH = "prompt=", "model.path="
LISTED = (
    "in a list each prompt is quoted if it holds more than letters, digits and spaces: "
    "prompt=\"['Hello, world!','What is 2+2?']\""
)


def quote_prompts(words: Sequence[str]) -> list[str]:
    """A command line's words with the prompts and paths quoted that Hydra would misread.

    >>> quote_prompts(["model=smollm2", "prompt=Hello, world", "prompt=[a,b]"])
    ['model=smollm2', "prompt='Hello, world'", 'prompt=[a,b]']
    """
    sweep = any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words)
    return [_quoted(word, sweep) if word.startswith(_KEY) else _quoted_path(word, sweep) for word in words]


def _quoted_path(word: str, sweep: bool) -> str:
    if not word.startswith(_PATH):
        return word
    try:
        if sweep or not OverridesParser.create().parse_override(word).is_sweep_override():
            return word
    except HydraException:
        if sweep and "," in word:
            return word
    return _PATH + quoted(word.removeprefix(_PATH))


def _quoted(word: str, sweep: bool) -> str:
    text = word.removeprefix(_KEY)
    if text.lstrip().startswith("["):
        return word  # a list; one that cannot be read is refused, not taken for a text
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException:
        return _KEY + quoted(text)
    value = parsed._value
    if parsed.is_sweep_override():
        return word if sweep else _KEY + quoted(text)
    if isinstance(value, QuotedString) or value is None or (value == text and "${" not in text):
        return word
    return _KEY + quoted(text)


def quoted(text: str) -> str:
    """A text as Hydra's grammar writes it, so that it means itself.

    >>> quoted("What's up?")
    "'What\\\\'s up?'"
    """
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)  # no interpolation
    # A backslash means itself, but before a quote.
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    return f"'{text}{text[len(text.rstrip(chr(92))) :]}'"
