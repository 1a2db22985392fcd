"""The ledger's form: what each claim has to say, checked key by key.

A claim has the papers' own words (`quote`), a verdict with its reason (`why`), what was found instead (`ours`: a place
in a run's file or the value of an executable check, never a typed number) and what shows it (`evidence`).
Faults are collected, so that one look at `python -m helix claims --check` shows all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from helix.claims import strict_yaml
from helix.config.schema import ConfigError

DEFAULT = Path("paper/claims.yaml")
REPRODUCED, NOT_REPRODUCED, INCONSISTENT, UNTESTABLE = VERDICTS = (
    "reproduced",
    "not reproduced",
    "inconsistent with itself",
    "not testable here",
)
KINDS = ("measured", "modelled", "computed")
# Of figures; `helix.claims.words` shows each.
UNITS = ("tokens/s", "bytes", "bytes/s", "ms", "s", "share", "times", "count", "p", "bits", "error")
EVIDENCE = ("test", "run", "command", "source")
# Of a quote: as it stands there, put together of a table's cells, or a formula without its typesetting.
FORMS = ("verbatim", "cells", "formula")
# Lists that README shows: as long as a reader still reads.
MOST_TELLING = 12


class LedgerError(ConfigError):
    """What is wrong with a ledger, one sentence a fault."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        more = f" ({len(faults) - 1} more: python -m helix claims --check lists them)" if len(faults) > 1 else ""
        super().__init__(faults[0] + more)


@dataclass(frozen=True)
class Paper:
    """One of the papers, by the short id that claims name it by."""

    title: str
    setting: str


@dataclass(frozen=True)
class Value:
    """A figure as the paper states it."""

    figure: float
    unit: str


@dataclass(frozen=True)
class Ours:
    """Where our figure for a claim is.

    Args:
        label: what was measured, modelled or computed.
        kind: one of `KINDS`.
        unit: one of `UNITS`.
        file: a run's file, relative to the repository; None for what the claim's own check returns.
        path: the figure in it, as `helix.claims.resolve.look_up` reads paths.
        interval: the path of its lower and upper end.
    """

    label: str
    kind: str
    unit: str
    file: str | None = None
    path: str | None = None
    interval: str | None = None


@dataclass(frozen=True)
class Check:
    """An executable check of `helix.claims.arithmetic` and what it is given."""

    name: str
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """What shows a verdict: a test, a run's file, a command to type, or a source outside."""

    kind: str
    words: str


@dataclass(frozen=True)
class Claim:
    """One claim of one paper."""

    id: str
    paper: str
    section: str
    quote: str
    verdict: str
    why: str
    evidence: tuple[Evidence, ...] = ()
    value: Value | None = None
    ours: tuple[Ours, ...] = ()
    check: Check | None = None
    hard: str = ""
    telling: bool = False
    form: str = "verbatim"


@dataclass(frozen=True)
class Ledger:
    """All claims, in the order of the file."""

    path: Path
    papers: Mapping[str, Paper]
    claims: tuple[Claim, ...]

    @property
    def root(self) -> Path:
        """The repository: runs and tests are named from here."""
        return self.path.absolute().parent.parent

    def __getitem__(self, name: str) -> Claim:
        """The claim of an id.

        Raises:
            ConfigError: if there is none.
        """
        for claim in self.claims:
            if claim.id == name:
                return claim
        raise ConfigError(f"there is no claim {name}{_near(name, [claim.id for claim in self.claims])}")


def read(path: Path | str = DEFAULT) -> Ledger:
    """Read a ledger.

    Raises:
        ConfigError: if the file is missing, no YAML, or has a key twice.
        LedgerError: if a claim breaks the form, with every fault.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no ledger {path}; run this in the repository, or give --ledger PATH")
    faults: list[str] = []
    ledger = _Reader(faults).ledger(path, strict_yaml.load(path))
    if faults:
        raise LedgerError(faults)
    return ledger


class _Reader:
    """Makes dataclasses of plain YAML, and keeps what is wrong with it."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults

    def ledger(self, path: Path, content: Any) -> Ledger:
        top = self._keys(content, str(path), {"papers": dict, "claims": list})
        papers = {name: self._paper(f"{path}: papers.{name}", each) for name, each in top.get("papers", {}).items()}
        claims = tuple(self._claim(each, number, papers) for number, each in enumerate(top.get("claims", []), 1))
        twice = [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]
        self.faults += [f"{name}: id is there more than once" for name in twice]
        if sum(claim.telling for claim in claims) > MOST_TELLING:
            self.faults.append(f"{path}: telling marks more than {MOST_TELLING} claims")
        return Ledger(path, papers, claims)

    def _paper(self, where: str, content: Any) -> Paper:
        needed = {"title": str, "setting": str}
        return Paper(**dict.fromkeys(needed, "") | self._keys(content, where, needed))

    def _claim(self, content: Any, number: int, papers: Mapping[str, Paper]) -> Claim:
        name = content.get("id") if isinstance(content, dict) else None
        where = str(name or f"claim {number}")
        needed = dict.fromkeys(("id", "paper", "section", "quote", "verdict", "why"), str)
        allowed = {
            "evidence": list,
            "value": dict,
            "ours": list,
            "check": dict,
            "hard": str,
            "telling": bool,
            "form": str,
        }
        found = self._keys(content, where, needed, allowed)
        self._one_of(where, "verdict", found.get("verdict"), VERDICTS)
        self._one_of(where, "form", found.get("form"), FORMS)
        self._one_of(where, "paper", found.get("paper"), tuple(papers))
        claim = Claim(
            **{key: found.get(key, "") for key in needed},
            evidence=tuple(each for one in found.get("evidence", []) for each in self._evidence(where, one)),
            value=self._value(where, found["value"]) if "value" in found else None,
            ours=tuple(self._ours(where, one) for one in found.get("ours", [])),
            check=self._check(where, found["check"]) if "check" in found else None,
            hard=found.get("hard", ""),
            telling=found.get("telling", False),
            form=found.get("form", FORMS[0]) if found.get("form") in FORMS else FORMS[0],
        )
        self._supported(where, claim)
        return claim

    def _supported(self, where: str, claim: Claim) -> None:
        """That a verdict has the evidence which it needs."""
        kinds = {each.kind for each in claim.evidence}
        if not kinds and claim.check is None:
            self.faults.append(f"{where}: evidence is missing; give one of: {', '.join(EVIDENCE)}, or a check")
        if claim.verdict == INCONSISTENT and claim.check is None:
            self.faults.append(f"{where}: verdict '{INCONSISTENT}' needs a check, its arithmetic")
        if claim.verdict in (REPRODUCED, NOT_REPRODUCED) and not kinds & {"test", "run"}:
            self.faults.append(f"{where}: verdict '{claim.verdict}' needs evidence by a test or a run")
        if claim.check is None and any(each.file is None for each in claim.ours):
            self.faults.append(f"{where}: ours has neither a file nor a check to take its figure from")

    def _value(self, where: str, content: Any) -> Value | None:
        found = self._keys(content, f"{where}: value", {"figure": float, "unit": str})
        self._one_of(where, "value.unit", found.get("unit"), UNITS)
        return Value(**found) if len(found) == 2 else None

    def _ours(self, where: str, content: Any) -> Ours:
        needed, allowed = (
            dict.fromkeys(("label", "kind", "unit"), str),
            dict.fromkeys(("file", "path", "interval"), str),
        )
        found = self._keys(content, f"{where}: ours", needed, allowed)
        self._one_of(where, "ours.kind", found.get("kind"), KINDS)
        self._one_of(where, "ours.unit", found.get("unit"), UNITS)
        if ("file" in found) != ("path" in found):
            self.faults.append(f"{where}: ours needs file and path together, or neither for the check's own figure")
        return Ours(**dict.fromkeys(needed, "") | found)

    def _check(self, where: str, content: Any) -> Check | None:
        found = self._keys(content, f"{where}: check", {"name": str}, {"given": dict})
        return Check(found["name"], found.get("given", {})) if "name" in found else None

    def _evidence(self, where: str, content: Any) -> list[Evidence]:
        found = self._keys(content, f"{where}: evidence", {}, dict.fromkeys(EVIDENCE, str))
        return [Evidence(kind, words) for kind, words in found.items()]

    def _one_of(self, where: str, key: str, value: Any, legal: tuple[str, ...]) -> None:
        if value is not None and value not in legal:
            self.faults.append(f"{where}: {key} is '{value}', which is none of: {', '.join(legal)}")

    def _keys(
        self, content: Any, where: str, needed: Mapping[str, type], allowed: Mapping[str, type] | None = None
    ) -> dict[str, Any]:
        """The keys of a mapping that are right; a fault for each that is not, or is missing."""
        legal = dict(needed) | dict(allowed or {})
        if not isinstance(content, dict):
            self.faults.append(f"{where} has to be a mapping with the keys {', '.join(legal)}")
            return {}
        found = {}
        for key, value in content.items():
            if key not in legal:
                self.faults.append(f"{where}: there is no key '{key}'{_near(str(key), list(legal))}")
            elif not _is(value, legal[key]):
                self.faults.append(f"{where}: {key} has to be {_KIND[legal[key]]}, not {value!r}")
            else:
                found[key] = value.strip() if isinstance(value, str) else value
        self.faults += [f"{where}: {key} is missing" for key in needed if key not in content]
        return found


_KIND: dict[type, str] = {
    str: "a text that is not empty",
    float: "a number",
    bool: "true or false",
    list: "a list that is not empty",
    dict: "a mapping that is not empty",
}


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    return isinstance(value, kind) and bool(value.strip() if isinstance(value, str) else value)


def _near(name: str, legal: list[str]) -> str:
    """A word on what was meant, or on what there is."""
    near = get_close_matches(name, legal, n=1)
    if near:
        return f" (did you mean {near[0]}?)"
    return f"; legal: {', '.join(legal)}" if len(legal) <= 12 else "; python -m helix claims lists them"
