"""What an import must not bring along, each probed in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import helix

HEAVY = ("torch", "deepspeed", "lightning", "pytorch_lightning")


def imported(code: str, modules: tuple[str, ...] = HEAVY) -> set[str]:
    """Which of `modules` a fresh interpreter has loaded after running `code`."""
    probe = f"{code}\nimport sys\nprint('loaded:', *(name for name in {modules!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("loaded:")[1].split())


LIGHT = """
import helix
from helix import Grid, PartitionError
import helix.partition.grid, helix.partition.shape, helix.partition.schedules, helix.partition.cost
import helix.config.schema, helix.generation.asked
import helix.study.text, helix.study.statistics, helix.study.report, helix.study.table, helix.study.tracking
import helix.study.runs
"""


def test_starts_without_torch() -> None:
    """All of it together, so each of it alone."""
    assert imported(LIGHT) == set()


def test_public_names_need_neither_deepspeed_nor_lightning() -> None:
    assert imported("from helix import launch, HelixAttention, verify") == {"torch"}


def test_the_probe_sees_what_is_imported() -> None:
    assert imported("import json, wsgiref.util", ("json", "wsgiref", "xmlrpc")) == {"json", "wsgiref"}


def test_the_probe_sees_torch() -> None:
    """By the very names it looks for: were one misspelt, the tests above could not fail."""
    assert imported("import torch, deepspeed, lightning.pytorch, pytorch_lightning") == set(HEAVY)


@pytest.mark.parametrize("name", helix.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(helix, name) is not None
    assert name in dir(helix)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        helix.nothing  # noqa: B018
