"""`python -m helix bench`: that it measures and refuses; and, asked for by `-m benchmark`, what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helix.study.alternate import Comparison, step_ms


def bench(*options: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "helix", "bench", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def figures(path: Path, *options: str, timeout_s: float = 90) -> dict[str, Any]:
    """The JSON of a bench that must succeed."""
    done = bench(*options, "--json", str(path), timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    assert "ms a step" in done.stdout
    return json.loads(path.read_text())


TINY = ("--m", "2", "--n", "1", "--heads", "2", "--head-dim", "8", "--batch", "2", "--length", "8")


@pytest.mark.parametrize("layer", [False, True])
def test_attention_bench_measures_every_legal_schedule(layer: bool, tmp_path: Path) -> None:
    options = [*TINY, "--rounds", "2", "--warmup", "1", *(["--layer"] if layer else [])]
    found = figures(tmp_path / "out.json", "attention", *options)
    exact = {"batch", "heads", "rows", "gather", "score"}
    assert set(found["step_ms"]) == {"perslice", *exact}
    assert all(len(times["runs"]) == 2 and min(times["runs"]) > 0 for times in found["step_ms"].values())
    assert all(found["relative_error"][name] < 1e-5 for name in exact)
    assert found["relative_error"]["perslice"] > 0.05
    ratios = found["speed_ratio"]["perslice"]
    assert set(ratios) == exact
    assert all(ratio["ci95"][0] <= ratio["ratio"] <= ratio["ci95"][1] for ratio in ratios.values())


def test_model_bench_agrees_with_its_peers(tmp_path: Path) -> None:
    """And leaves out the schedules' baseline: its baselines are the peers."""
    options = [*TINY, "--width", "16", "--mlp", "24", "--layers", "1", "--rounds", "2", "--warmup", "1"]
    found = figures(tmp_path / "out.json", "model", *options, "--peers", "plain", "sequence", "helix")
    assert list(found["step_ms"]) == ["Helix 2x1", "TP2 plain", "TP2 sequence", "Helix 1x2"]
    assert list(found["speed_ratio"]) == ["TP2 plain", "TP2 sequence", "Helix 1x2"]
    assert max(found["relative_error"].values()) < 1e-5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["attention", "--m", "0"], "at least 1"),
        (["attention", "--heads", "many"], "whole number"),
        (["attention", "--m", "3"], "m=3 does not divide head_dim=64"),
        (["attention", "--heads", "6"], "legal (m, n) on 16 ranks: (8, 2), (16, 1)"),
        (["attention", "--ranks", "8"], "--ranks 8 is not m*n = 4*4 = 16"),
        (["attention", "--schedules", "ring"], "invalid choice: 'ring'"),
        (["attention", "--batch", "1", "--schedules", "batch"], "the batch has 1"),
        (["attention", "--rounds", "1"], "--rounds of at least 2"),
        (["attention", "--json", "no/such/folder/out.json"], "there is no folder"),
        (["attention", "--bach", "2"], "--bach"),
        (["model", "--kv-heads", "4"], "whole heads"),
        (["model", "--length", "100"], "--length divisible by 16"),
        (["model", "--schedule", "perslice"], "invalid choice: 'perslice'"),
        (["model", "--width", "100"], "does not divide --width 100"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "required"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], says: str) -> None:
    start = time.monotonic()
    done = bench(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 5


def test_a_step_lasts_from_the_first_start_to_the_last_end() -> None:
    ranks = [{"a": [(0.0, 1.0), (5.0, 5.5)]}, {"a": [(0.5, 2.0), (4.5, 5.0)]}]
    assert step_ms(ranks) == {"a": [pytest.approx((2.0 + 1.0) / 2 * 1e3)]}


def test_speed_is_the_baselines_time_over_ones_own() -> None:
    comparison = Comparison("", 8, {"fast": [1.0, 2.0], "slow": [2.0, 4.0]}, {}, ("slow",))
    assert comparison.speed("fast", "slow").ratio == pytest.approx(2)


@pytest.mark.benchmark
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("batch", "length"),
    [
        pytest.param(4, 256, marks=pytest.mark.xfail(reason="measured 0.73 (0.65 .. 0.82), paper/LOG.md, 2026-11-22")),
        pytest.param(
            1, 1024, marks=pytest.mark.xfail(reason="measured 0.89 (0.85 .. 0.94), paper/LOG.md, 2026-11-22")
        ),
        (1, 2048),
    ],
)
def test_an_exact_schedule_is_as_fast_as_the_papers_formula(batch: int, length: int, tmp_path: Path) -> None:
    """The estimate, not its interval's lower end, is held to 1: the claim is "at least as fast"."""
    sizes = ["--batch", str(batch), "--length", str(length), "--schedules", "perslice", "heads"]
    sizes += ["batch"] if batch > 1 else []
    found = figures(tmp_path / "out.json", "attention", *sizes, timeout_s=300)
    assert max(ratio["ratio"] for ratio in found["speed_ratio"]["perslice"].values()) >= 1.0


@pytest.mark.benchmark
@pytest.mark.timeout(400)
def test_the_model_is_a_fifth_faster_than_tensor_parallelism(tmp_path: Path) -> None:
    found = figures(tmp_path / "out.json", "model", timeout_s=300)
    for peer, ratios in found["speed_ratio"].items():
        assert ratios["Helix 4x4"]["ratio"] >= 1.2, peer
