"""Generated command lines: a sample, the long run by its marker, and what was found so far as plain cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_bad_input import (
    ROOT,
    Case,
    case,
    check_case,
    contents,
    exit_code,
    infer,  # noqa: F401  a fixture
    machine,  # noqa: F401  a fixture
)

LONG, DEEP = "A" * 300, "a: " + "[" * 3000
FOUND = [
    case("rerun", "--experimental-rerun x", "runs what is in a pickle", ".hydra/overrides.yaml", files={"x": "y"}),
    case("hydra-help", "--hydra-help model=tiny", "model"),
    case("completion", "--shell-completion model=tiny", "install=bash"),
    case("config-name", "--config-name=", "--config-name takes a config's name"),
    case("run-folder-long", f"hydra.run.dir={LONG}", "hydra.run.dir", "File name too long"),
    case("text-long", f"workload.text={LONG}", "is too long for a file's name"),
    case("option-nested", "workload=[[]]", "names no option", "workload=small"),
    case("null-merged", "hydra.sweeper.params={seed:1}", "hydra.sweeper.params is null", "+hydra.sweeper"),
    case("curve-of-texts", "hardware.products.low=[[]]", "hardware.products.low"),
    case("slurm-hosts", "", "SLURM_NNODES", env={"SLURM_PROCID": "0", "SLURM_NTASKS": "5", "SLURM_NNODES": "x"}),
    case("yaml-deep", "--config-dir x model=mine", "nested too deeply", files={"x/model/mine.yaml": DEEP}),
]
FOUND_BY_HELIX = [
    case("ledger-long", f"claims --ledger {LONG}", "is too long for a file's name"),
    case("plan-option-nested", "plan workload=[[]]", "names no option"),
]


@pytest.mark.parametrize("one", FOUND, ids=lambda one: one.name)
def test_found_is_refused(
    one: Case,
    infer: ModuleType,  # noqa: F811
    machine: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_case(one, infer, machine, monkeypatch, capsys)


@pytest.mark.parametrize("one", FOUND_BY_HELIX, ids=lambda one: one.name)
def test_found_is_refused_by_helix(one: Case, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    from helix.__main__ import main

    assert exit_code(lambda: main(one.arguments.split())) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("python -m helix: error: ")
    assert said.err.count("\n") == 1
    for fragment in one.expected:
        assert fragment in said.err
    assert contents(machine) == set()


def _generated(*options: str, limit_s: float) -> str:
    """In an interpreter of its own: its forks have to be without torch, which a test before may have imported."""
    command = [sys.executable, "tests/fuzz.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sample_of_generated_lines() -> None:
    assert "15 command lines, 0 of them ended wrongly" in _generated("--examples=15", "--checks-only", limit_s=100)


@pytest.mark.fuzz
@pytest.mark.timeout(600)
def test_hundreds_of_generated_lines() -> None:
    assert "200 command lines, 0 of them ended wrongly" in _generated("--examples=200", "--seed=5", limit_s=580)
