"""The statistics against worked examples, and their intervals against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from helix.study.statistics import ratio_interval, summarize

TRIALS = 2000
RUNS = 5
# How many of 2000 intervals of 95 % hold the truth: binomial, and outside these bounds once in 10,000 tries.
FEWEST, MOST = (int(stats.binom.ppf(q, TRIALS, 0.95)) for q in (5e-5, 1 - 5e-5))


def test_worked_example() -> None:
    summary = summarize([1, 2, 3, 4, 5])
    assert summary.runs == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert summary.mean == 3
    assert summary.sd == pytest.approx(math.sqrt(2.5), rel=1e-15)
    # t(0.975, 4) = 2.7764, from a printed table of four decimals; times sd / sqrt(5) = 0.70711.
    assert summary.ci95 == pytest.approx((3 - 2.7764 * 0.70711, 3 + 2.7764 * 0.70711), abs=1e-4)
    assert summary.cv == pytest.approx(math.sqrt(2.5) / 3, rel=1e-15)


def test_equal_runs_have_no_spread() -> None:
    summary = summarize([0.1] * 7)
    assert (summary.mean, summary.sd, summary.ci95, summary.cv) == (0.1, 0, (0.1, 0.1), 0)


def test_mean_zero_has_no_cv() -> None:
    assert summarize([0, 0]).cv is None


def test_95_percent_of_the_intervals_hold_the_mean() -> None:
    rng = np.random.default_rng(0)
    intervals = [summarize(rng.normal(100, 7, RUNS).tolist()).ci95 for _ in range(TRIALS)]
    assert FEWEST <= sum(low <= 100 <= high for low, high in intervals) <= MOST


def test_95_percent_of_the_intervals_hold_the_ratio() -> None:
    """a is 1.25 times b, each pair shares a mood that is far larger than the difference."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(TRIALS):
        mood = rng.lognormal(0, 2, RUNS)
        a, b = (mood * rng.lognormal(mean, 0.1, RUNS) for mean in (math.log(1.25), 0))
        low, high = ratio_interval(a.tolist(), b.tolist()).ci95
        held += low <= 1.25 <= high
    assert FEWEST <= held <= MOST


def test_the_coverage_test_can_fail() -> None:
    """Normal quantiles in place of Student's, a common mistake, hold too few: 88 % with five runs."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(TRIALS):
        summary = summarize(rng.normal(100, 7, RUNS).tolist())
        held += abs(summary.mean - 100) <= 1.96 * summary.sd / math.sqrt(RUNS)
    assert held < FEWEST


def test_ratio_of_a_constant_factor_is_exact() -> None:
    ratio = ratio_interval([2.0, 6.0, 10.0], [1.0, 3.0, 5.0])
    assert ratio.ratio == pytest.approx(2, rel=1e-15)
    assert ratio.ci95 == pytest.approx((2, 2), rel=1e-12)  # exp(log) rounds
    assert ratio.pairs == 3


positive = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8))
def test_the_inverse_ratio_has_the_inverse_interval(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = ratio_interval(a, b), ratio_interval(b, a)
    assert there.ratio == pytest.approx(1 / back.ratio, rel=1e-9)  # rounding of logs and sums
    assert there.ci95[0] == pytest.approx(1 / back.ci95[1], rel=1e-6)  # amplified by t = 12.7 with two pairs
    assert there.ci95[0] <= there.ratio <= there.ci95[1]


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_run_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"at least 2 runs, not {len(values)}"):
        summarize(values)
    with pytest.raises(ValueError, match=f"at least 2 runs, not {len(values)}"):
        ratio_interval(values, values)


def test_runs_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="finite"):
        summarize([1.0, math.nan])


@pytest.mark.parametrize(("a", "b", "message"), [([1, 2], [1], "not 2 and 1"), ([1, 0], [1, 1], "above 0")])
def test_ratio_refuses(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_interval(a, b)
