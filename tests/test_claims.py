"""The papers' ledger of claims: its evidence, its arithmetic, and what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helix.__main__ import main
from helix.claims import markdown, table
from helix.claims.arithmetic import CHECKS, run_check
from helix.claims.faults import faults
from helix.claims.ledger import INCONSISTENT, VERDICTS, Ledger, read
from helix.config.schema import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "claims.md")


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return read(REPOSITORY / "paper/claims.yaml")


# ---------------------------------------------------------------- the papers' ledger


def test_every_claim_has_its_evidence_and_every_check_says_what_its_verdict_says(ledger: Ledger) -> None:
    assert faults(ledger) == []


def test_the_ledger_covers_the_papers(ledger: Ledger) -> None:
    found = table.counts(ledger)
    assert found["all"]["all"] == len(ledger.claims) >= 130
    assert set(found) == {*VERDICTS, "all"}
    assert all(found["all"][paper] >= 10 for paper in ("full", "concise", "keypoints"))
    assert sum(found[verdict]["all"] for verdict in VERDICTS) == found["all"]["all"]
    assert len(table.telling(ledger)) == 12
    assert 8 <= len(table.hardest(ledger)) <= 14
    assert {claim.check.name for claim in ledger.claims if claim.check} == set(CHECKS)  # none that nothing needs


def test_rows_are_text_and_numbers(ledger: Ledger) -> None:
    (one,) = (row for row in table.rows(ledger, INCONSISTENT, "full") if row.id == "full-cohens-d")
    assert (one.stated, one.verdict, one.paper) == ("2.85", INCONSISTENT, "full")
    assert one.found[0].value == pytest.approx(94.37, rel=1e-3)
    assert one.ours == "d of the stated intervals: 94.37, computed"
    assert "380,000 / 4,027 = 94.4" in one.arithmetic
    measured = table.row(ledger, ledger["full-strong-baseline"]).found[1]
    report = json.loads((REPOSITORY / "paper/results/2026-11-22_baselines_dense.json").read_text())
    (paired,) = (each["paired"] for each in report["baselines"] if each["method"]["name"] == "dp16")
    assert (measured.value, measured.interval) == (paired["ratio"], tuple(paired["ci95"]))
    with pytest.raises(ConfigError, match=r"no claim full-cohen \(did you mean full-cohens-d\?\)"):
        ledger["full-cohen"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_are_up_to_date(page: Path, ledger: Ledger) -> None:
    text = page.read_text()
    assert markdown.update(ledger, text, page) == text, f"run: python -m helix claims --update {page}"


# ---------------------------------------------------------------- arithmetic

P16 = "paper_dense_16l"
SHAPE = {"model": P16, "batch": 128, "length": 10_000}
# 16 layers of 4 D^2 and 2 D F, and 2 x 256 x D of both ends, norms aside: 3.22e9 parameters.
PARAMETERS = 16 * (4 * 4096**2 + 2 * 4096 * 16384) + 2 * 256 * 4096
FLOPS = 2 * PARAMETERS + 16 * 2 * 2 * 4096 * 5000  # of a token: it sees 5,000 others on average


def share(speed: float, flops: float = FLOPS) -> float:
    return speed * flops / (16 * 989e12)


@pytest.mark.parametrize(
    ("name", "given", "follows", "agrees", "otherwise"),
    [
        ("parameters_per_device", {"model": P16, "stated": 45e9}, PARAMETERS / 8, False, {"stated": 0.4e9}),
        ("total_per_device", {"model": P16, "parts": [25e9, 2e9], "stated": 72e9}, 27e9 + PARAMETERS / 8, False,
         {"stated": 27.4e9}),
        ("cache_within", {**SHAPE, "stated": 18e9}, 2 * 16 * 128 * 10_000 * 4096 * 2 / 16, False, {"stated": 22e9}),
        ("whole_input_within", {**SHAPE, "stated": 6e9}, 128 * 10_000 * 4096 * 2, False, {"stated": 11e9}),
        ("whole_input_within", {**SHAPE, "stated": 6e9, "parts": 2}, 128 * 10_000 * 4096, True, {"parts": 1}),
        ("share_of_peak", {**SHAPE, "tokens_per_s": 1.58e6}, share(1.58e6), True, {"tokens_per_s": 2.1e6}),
        ("share_of_peak", {**SHAPE, "tokens_per_s": 1.58e6, "devices": 8, "causal": False, "efficiency": 0.85},
         share(1.58e6 / 0.85, FLOPS + 16 * 2 * 2 * 4096 * 5000), False, {"efficiency": 0.95}),
        ("same_speed", {"models": ["paper_dense_2l", P16], "batch": 128, "length": 10_000, "stated": 1.58e6}, 7.98,
         False, {"models": [P16]}),
        ("block_coverage", {"heads": 32, "head_dim": 128, "m": 4, "n": 4}, 1 / 16, False, {"m": 1, "n": 1}),
        # all-gather and MLP's all-reduce over 16 in 16 layers; two all-reduces over 8 in 8 layers: 3 x 15/16 x 16
        # over 4 x 7/8 x 8, and a little for the ends and the send between stages.
        ("sent_bytes", {**SHAPE, "m": 4, "n": 4, "tensor": 8, "stage": 2}, 45 / 28, False, {"m": 1, "n": 2}),
        ("gpus_of_system", {"hardware": "dgx_h100", "stated": 16}, 8, False, {"systems": 2}),
        ("bandwidth_within", {"stated": [2.1e12, 2.8e12], "tokens_per_s": [1.2e6, 1.58e6]}, 3.35e12, True,
         {"stated": [2.1e12, 3.8e12]}),
        ("change", {"before": 0.35, "after": 0.22, "stated": 37.1}, 13 / 35, True, {"stated": 37.2}),
        ("change_within", {"changes": [[0.35, 0.22], [0.45, 0.3]], "low": 33, "high": 37}, 13 / 35, True, {"low": 34}),
        ("listed", {"stated": 2, "names": ["dense"]}, 1, False, {"stated": 1}),
        ("one_value", {"stated": [2, 4, 16]}, 3, False, {"stated": [4, 4]}),
        ("one_value", {"stated": ["yes", "no"]}, 2, False, {"stated": ["no", "no"]}),
        ("enough", {"needed": 32, "available": 16}, 32, False, {"available": 32}),
        ("cores", {"sockets": 2, "cores_each": 56, "stated": 192}, 112, False, {"stated": 112}),
        ("width_of_heads", {"heads": 32, "head_dim": 128, "stated": 4096}, 4096, True, {"stated": 8192}),
        ("most_devices", {"heads": 32, "head_dim": 128, "stated": 32}, 32, True, {"stated": 64}),
        ("idle_devices", {"devices": 16, "heads": 4}, 12, True, {"heads": 32}),
        ("more_devices_than_heads", {"devices": 16, "heads": [32, 16, 32]}, 0, False, {"devices": 17}),
        ("communication_time", {"tokens_per_s": 1.58e6, "ms_per_token": 0.22, "devices": 16, "batch": 128}, 347.6,
         False, {"batch": 1024}),
        ("batches_of_weak_scaling", {"batch": 128, "at": 16, "devices": [8, 16, 32]}, 3, False, {"devices": [16]}),
        ("busy_time", {"shares": [0.7, 0.85], "tokens_per_s": [1.2e6, 1.58e6], "stated": 0.371},
         1 - 0.85 / 1.58 * 1.2 / 0.7, True, {"stated": 0.01}),  # which as bandwidth needs more bytes
        # t of 4 degrees of freedom is 2.7764 at 97.5 %.
        ("cohens_d", {"before": 1.2e6, "after": 1.58e6, "half": 5000, "runs": 5, "stated": 2.85},
         380 / (5 * 5**0.5 / 2.7764), False, {"stated": 95}),
        ("p_of_effect", {"d": 2.85, "pairs": 5, "below": 0.001}, 0.00311, False, {"below": 0.01}),
        # t = 2.85 sqrt(5 / 0.2) = 14.25, of four degrees of freedom
        ("p_of_effect", {"d": 2.85, "pairs": 5, "below": 0.001, "correlation": 0.9}, 0.000141, True,
         {"correlation": 0.7}),
        ("variation", {"mean": 0.22, "half": 0.01, "runs": 5, "stated": 0.01, "rounding": 0.005},
         0.005 * 5**0.5 / 2.7764 / 0.225, False, {"stated": 0.02}),
        ("interval_of_change", {"before": 1.2e6, "after": 1.58e6, "half_before": 5e3, "half_after": 5e3,
                                "stated": [31.2, 32.1]}, 1.58 / 1.2 * (5 / 1200 - 5 / 1580), True,
         {"stated": [31.6, 31.7]}),
    ],
)  # fmt: skip
def test_arithmetic(name: str, given: dict[str, Any], follows: float, agrees: bool, otherwise: dict[str, Any]) -> None:
    """Against sums by hand; and with other figures each check says the opposite."""
    found = run_check(name, given)
    assert found.follows == pytest.approx(follows, rel=0.01)
    assert found.agrees is agrees
    assert found.words.isascii()
    assert run_check(name, given | otherwise).agrees is not agrees


def test_rounding_can_save_an_interval() -> None:
    """By its digits [0.34, 0.36] excludes [36.2, 38.0]; half a digit of doubt in all four figures does not."""
    given = {"before": 0.35, "after": 0.22, "half_before": 0.01, "half_after": 0.01, "stated": [36.2, 38.0]}
    assert not run_check("interval_of_change", given).agrees
    assert run_check("interval_of_change", given | {"rounding": 0.005}).agrees


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(REPOSITORY)
    main(["claims"])
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(mark in said for mark, _ in table.SIGNS.values())
    assert "hardest to decide" in lines
    main(["claims", "--verdict", "not-reproduced", "--paper", "keypoints"])
    said = capsys.readouterr().out
    assert "keypoints-communication-efficiency" in said
    assert "keypoints-throughput" not in said
    assert "full-" not in said


def test_one_claim_is_shown_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(REPOSITORY)
    main(["claims", "--id", "full-strong-scaling"])
    said = capsys.readouterr().out
    for words in ("85% efficiency", "91% of the peak", "not testable here", "check share_of_peak", "hard "):
        assert words in said
