"""Our figures behind a claim: looked up in runs' files, or returned by its check."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from helix.claims.arithmetic import Outcome, run_check
from helix.claims.ledger import Claim, Ledger, Ours
from helix.config.schema import ConfigError
from helix.partition.grid import PartitionError

# One step of a path, as `look_up` says.
_STEP = re.compile(
    r"""\.?(?:(?P<name>[\w-]+)|(?P<sum>\*)|\[(?P<index>\d+)\]|\["(?P<key>[^"]+)"\]|\[(?P<where>[^\]"]+)\]"""
    r"""|\((?P<pair>[^)]+)\))"""
)


@dataclass(frozen=True)
class Found:
    """One of our figures.

    Args:
        label: what it is of.
        value, interval: in `unit`; a 95 % interval of the mean where the runs have one.
        kind: measured, modelled or computed.
    """

    label: str
    value: float
    interval: tuple[float, float] | None
    unit: str
    kind: str


def found(ledger: Ledger, claim: Claim) -> tuple[Found, ...]:
    """Our figures for a claim.

    Raises:
        ConfigError: naming the claim, if a file, a place in it, or a check is not there.
    """
    return tuple(_found(ledger, claim, one) for one in claim.ours)


def outcome(claim: Claim) -> Outcome | None:
    """What a claim's executable check says; None without one.

    Raises:
        ConfigError: naming the claim, if there is no such check or it is given the wrong arguments.
    """
    if claim.check is None:
        return None
    try:
        return run_check(claim.check.name, claim.check.given)
    except (ConfigError, PartitionError) as error:
        raise ConfigError(f"{claim.id}: check: {error}") from error


def look_up(content: Any, path: str) -> Any:
    """The value at a path.

    Its steps: names joined by dots, ["any/name"], [3], [method.name=tp16,stage=1] for the one element that has these,
    * for the sum of all of a mapping's values, (low, high) for several values as a list.

    Raises:
        ConfigError: if there is no such place, naming the step.
    """
    at, value = 0, content
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            raise ConfigError(f"path {path} cannot be read at '{path[at:]}'")
        try:
            value = _take(value, step)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"path {path}: there is nothing at '{step.group().lstrip('.')}'") from error
        at = step.end()
    return value


def _take(value: Any, step: re.Match[str]) -> Any:
    if step["sum"]:
        return sum(value.values())
    if step["pair"]:
        return [value[name.strip()] for name in step["pair"].split(",")]
    if step["where"] is None:
        return value[int(step["index"])] if step["index"] else value[step["name"] or step["key"]]
    pairs = [pair.partition("=") for pair in step["where"].split(",")]
    (one,) = (each for each in value if all(str(_at(each, key)) == wanted for key, _, wanted in pairs))
    return one


def _at(value: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


@lru_cache(maxsize=64)
def load(path: Path) -> Any:
    """A run's file: JSON, or CSV as a list of rows with numbers for numbers.

    Raises:
        ConfigError: if there is none, or it is neither.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".csv":
            with path.open(newline="") as lines:
                return [{key: _plain(text) for key, text in row.items()} for row in csv.DictReader(lines)]
    except (ValueError, csv.Error, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    raise ConfigError(f"{path} is neither .json nor .csv")


def _plain(text: Any) -> Any:
    """A cell's number, or its text; what a row has beyond its names is a list."""
    try:
        return float(text) if text else None
    except (ValueError, TypeError):
        return text


def _found(ledger: Ledger, claim: Claim, ours: Ours) -> Found:
    if ours.file is None or ours.path is None:
        said = outcome(claim)
        if said is None:
            raise ConfigError(f"{claim.id}: ours has neither a file nor a check to take its figure from")
        return Found(ours.label, said.follows, None, ours.unit, ours.kind)
    try:
        content = load(ledger.root / ours.file)
        value = _number(look_up(content, ours.path), ours.path)
        ends = None
        if ours.interval is not None:
            low, high = (_number(end, ours.interval) for end in look_up(content, ours.interval))
            ends = low, high
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{claim.id}: ours: {ours.file}: {error}") from error
    return Found(ours.label, value, ends, ours.unit, ours.kind)


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"path {path} is {value!r}, which is no number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"path {path} is a number of {len(str(value))} digits, too large to show") from None
