"""What a ledger refers to and is not there, or says otherwise than its files and checks."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

from helix.claims.ledger import REPRODUCED, UNTESTABLE, Claim, Evidence, Ledger
from helix.claims.outcome import Outcome
from helix.claims.resolve import Found, found, outcome
from helix.claims.words import filled
from helix.config.schema import ConfigError

PROGRAMS = ("python -m helix", "python infer.py", "python train.py", "make")
# A number with a unit, as people type it; what a unit of the ledger is multiplied by to be in it.
_TYPED = re.compile(r"(?<![\w.-])(?P<number>\d+(?:\.\d+)?) ?(?P<unit>%|[kMG]B|ms|times)(?!\w)")
_SCALES = {
    "share": {"%": 1e2},
    "bytes": {"kB": 1e-3, "MB": 1e-6, "GB": 1e-9},
    "ms": {"ms": 1.0},
    "times": {"times": 1.0},
}


def faults(ledger: Ledger) -> list[str]:
    """What the ledger refers to and is not there, or says otherwise: one sentence each, naming claim and key."""
    said = []
    for claim in ledger.claims:
        said += [_missing(ledger, claim, one) for one in claim.evidence]
        try:
            said.append(_verdict_against(claim, outcome(claim)))
            said += _typed(claim, found(ledger, claim))
        except ConfigError as error:
            said.append(str(error))
    return [each for each in said if each]


def _missing(ledger: Ledger, claim: Claim, evidence: Evidence) -> str:
    """What is wrong with one piece of evidence; nothing if it is there."""
    if evidence.kind == "run" and not (ledger.root / evidence.words).is_file():
        return f"{claim.id}: evidence: there is no run {evidence.words}"
    if evidence.kind == "test":
        name, _, function = evidence.words.partition("::")
        if function not in tests_of(ledger.root / name):
            return f"{claim.id}: evidence: there is no test {evidence.words}"
    if evidence.kind == "command" and not evidence.words.startswith(PROGRAMS):
        return f"{claim.id}: evidence: a command starts with one of: {', '.join(PROGRAMS)}"
    return ""


@lru_cache(maxsize=256)
def tests_of(path: Path) -> frozenset[str]:
    """Names of the test functions that a file defines; none if it is not there, or is no Python."""
    if not path.is_file():
        return frozenset()
    try:
        parsed = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last is the parser's, of deep nesting
        return frozenset()
    return frozenset(
        each.name for each in parsed.body if isinstance(each, ast.FunctionDef) and each.name[:5] == "test_"
    )


def _verdict_against(claim: Claim, said: Outcome | None) -> str:
    """A check that contradicts its claim's verdict."""
    if said is None or said.agrees == (claim.verdict in (REPRODUCED, UNTESTABLE)):
        return ""
    word = "agrees with" if said.agrees else "contradicts"
    return f"{claim.id}: its check {word} the claim, and the verdict is '{claim.verdict}': {said.words}"


def _typed(claim: Claim, figures: tuple[Found, ...]) -> list[str]:
    """Places of `why` and `hard` that name no figure, and figures of a run that are typed: they would outlive it."""
    said = []
    for text in (claim.why, claim.hard):
        try:
            filled(text, figures)
        except ConfigError as error:
            said.append(f"{claim.id}: {error}")
        for typed in _TYPED.finditer(text):
            same = [place for place, one in enumerate(figures) if one.kind != "computed" and _is(typed, one)]
            said += [f"{claim.id}: '{typed.group()}' is typed; write {{{place}}} for ours" for place in same[:1]]
    return said


def _is(typed: re.Match[str], one: Found) -> bool:
    """Whether a typed number is a figure, rounded to as many digits."""
    scale = _SCALES.get(one.unit, {}).get(typed["unit"])
    if scale is None:
        return False
    digits = len(typed["number"].partition(".")[2])
    return abs(one.value * scale - float(typed["number"])) <= 0.5 * 10**-digits
