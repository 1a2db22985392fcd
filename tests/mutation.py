"""An implementation that is wrong by one patch on every rank, and what it takes to put one together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from helix.certify.cases import Case

Patch = Callable[[], AbstractContextManager[Any]]
BOTH = ("fp32", "bf16")  # the tightest bound that models run with, and the widest
NEAR = ("fp32", "fp16")  # of faults so small that bf16 alone would hide them in some draws
OUTPUT = "the output is off by"


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Args:
        name: what is wrong.
        patch: puts it in place; entered on every rank.
        cases: that are verified with it, of which each has to fail.
        said: a pattern of the first failure of each.
        rank: the rank that it has to name, where the fault is one rank's and stays there.
        residual: layout of the stream.
    """

    name: str
    patch: Patch
    cases: tuple[Case, ...]
    said: str
    residual: str = "sharded"
    rank: str = r"\d+"


def replaced(where: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    """A function in place of another, made from it."""
    return lambda: patch.object(where, name, make(getattr(where, name)))


def layers(schedule: str, *precisions: str) -> tuple[Case, ...]:
    return tuple(Case("layer", schedule, precision) for precision in precisions)


def decodes(first: str, then: str, *precisions: str) -> tuple[Case, ...]:
    return tuple(Case("decode", first, precision, then) for precision in precisions)
