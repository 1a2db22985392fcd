"""The statistics against worked examples and scipy, and their intervals and tests against what they promise."""

from __future__ import annotations

import math
from dataclasses import asdict
from json import dumps

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helix.study.statistics import Runs, _bootstrap_interval, paired, ratio_interval, summarize, t_interval

TRIALS = 4000  # experiments, all at once: what `summarize` and `paired` call works on rows too
RUNS = 5


def expected(probability: float, trials: int = TRIALS) -> tuple[float, float]:
    """Bounds of a frequency whose probability is known: binomial, and outside of them once in 10,000 tries."""
    return tuple(stats.binom.ppf(q, trials, probability) / trials for q in (5e-5, 1 - 5e-5))


def moody_pairs(rng: np.random.Generator, log_ratio: float, noise: float) -> Runs:
    """log(baseline / subject)[trial, run]; the times of a pair share a drift far larger than their difference."""
    drift = rng.normal(0, 2, (TRIALS, RUNS)).cumsum(-1)
    baseline, subject = (
        np.exp(drift + rng.normal(mean, noise / math.sqrt(2), (TRIALS, RUNS))) for mean in (log_ratio, 0)
    )
    return np.log(baseline / subject)


def holding(intervals: tuple[Runs, Runs], truth: float) -> float:
    low, high = intervals
    return float(((low <= truth) & (truth <= high)).mean())


def t_ends(runs: Runs) -> tuple[Runs, Runs]:
    mean, _, half = t_interval(runs)
    return mean - half, mean + half


def test_worked_example() -> None:
    summary = summarize([1, 2, 3, 4, 5])
    assert summary.runs == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert summary.mean == 3
    assert summary.sd == pytest.approx(math.sqrt(2.5), rel=1e-15)
    # t(0.975, 4) = 2.7764, from a printed table of four decimals; times sd / sqrt(5) = 0.70711.
    assert summary.ci95 == pytest.approx((3 - 2.7764 * 0.70711, 3 + 2.7764 * 0.70711), abs=1e-4)
    assert summary.cv == pytest.approx(math.sqrt(2.5) / 3, rel=1e-15)


def test_the_bootstrap_is_the_distribution_of_resampled_means() -> None:
    """Against all 3125 resamples of five runs; one run stands out, so that the interval is lopsided."""
    runs = [1.0, 2.0, 3.0, 4.0, 15.0]
    means = np.stack(np.meshgrid(*[runs] * 5), -1).reshape(-1, 5).mean(-1)
    low, high = summarize(runs).bootstrap95
    # 9999 of them are drawn, with repetition: a quantile may be off by one step of the means, which is 0.2.
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.2 + 1e-9)
    assert summarize(runs).bootstrap95 == (low, high)  # again the same


def test_two_runs_bootstrap_to_themselves() -> None:
    assert summarize([1.0, 2.0]).bootstrap95 == (1, 2)


def test_equal_runs_have_no_spread() -> None:
    summary = summarize([0.1] * 7)
    assert (summary.mean, summary.sd, summary.ci95, summary.cv) == (0.1, 0, (0.1, 0.1), 0)
    assert summary.bootstrap95 == (0.1, 0.1)


def test_mean_zero_has_no_cv() -> None:
    assert summarize([0, 0]).cv is None


def test_rows_are_summarized_as_runs_are() -> None:
    """So that what holds of the rows below holds of `summarize` and `paired`."""
    rows = np.random.default_rng(0).lognormal(0, 0.3, (3, RUNS))
    for row, low, high in zip(rows, *t_ends(rows), strict=True):
        assert summarize(row.tolist()).ci95 == pytest.approx((low, high), rel=1e-12)
    for row, low, high in zip(rows, *_bootstrap_interval(rows), strict=True):
        assert summarize(row.tolist()).bootstrap95 == pytest.approx((low, high), rel=1e-12)
    for row, low, high in zip(rows, *t_ends(np.log(rows)), strict=True):
        assert paired(row.tolist(), [1.0] * RUNS).ci95 == pytest.approx((math.exp(low), math.exp(high)), rel=1e-12)


def test_95_percent_of_the_intervals_hold_the_mean() -> None:
    low, high = expected(0.95)
    held = holding(t_ends(np.random.default_rng(0).normal(100, 7, (TRIALS, RUNS))), 100)
    assert low <= held <= high


def test_95_percent_of_the_intervals_hold_the_ratio() -> None:
    low, high = expected(0.95)
    assert low <= holding(t_ends(moody_pairs(np.random.default_rng(1), math.log(1.25), 0.1)), math.log(1.25)) <= high


def test_the_coverage_test_can_fail() -> None:
    """Normal quantiles in place of Student's, a common mistake, hold too few: 88 % with five runs."""
    mean, sd, _ = t_interval(np.random.default_rng(0).normal(100, 7, (TRIALS, RUNS)))
    half = 1.96 * sd / math.sqrt(RUNS)
    assert holding((mean - half, mean + half), 100) < expected(0.95)[0]


@pytest.mark.parametrize(("runs", "documented"), [(RUNS, 0.835), (30, 0.935)])
def test_the_bootstrap_holds_the_mean_as_often_as_documented(runs: int, documented: float) -> None:
    """And not in 95 % of the cases. 499 resamples widen the tails' error by less than the bounds' width."""
    data = np.random.default_rng(0).normal(0, 1, (TRIALS, runs))
    held = holding(_bootstrap_interval(data, resamples=499), 0)
    low, high = expected(documented)
    assert low - 0.005 <= held <= high + 0.005
    assert held < expected(0.95)[0]


def test_without_a_difference_one_test_in_twenty_finds_one() -> None:
    low, high = expected(0.05)
    assert low <= 1 - holding(t_ends(moody_pairs(np.random.default_rng(2), 0.0, 0.1)), 0) <= high


@pytest.mark.parametrize("pairs", [2, 5, 30])
def test_the_detectable_ratio_is_found_in_80_percent(pairs: int) -> None:
    noise = 0.1
    sample = stats.zscore(np.random.default_rng(3).normal(size=pairs), ddof=1) * noise  # its sd is the true one
    ratio = paired(np.exp(sample).tolist(), [1.0] * pairs).minimum_detectable_ratio
    logs = np.random.default_rng(4).normal(math.log(ratio), noise, (TRIALS, pairs))
    low, high = expected(0.80)
    found, _ = t_ends(logs)  # in its own direction: the lower end is above 0
    assert low <= (found > 0).mean() <= high


def test_the_detectable_ratio_of_many_pairs_is_the_textbooks() -> None:
    """(1.960 + 0.842) standard errors, by the normal distribution that Student's t tends to."""
    logs = stats.zscore(np.arange(5000.0), ddof=1) * 0.1
    found = paired(np.exp(logs).tolist(), [1.0] * 5000).minimum_detectable_ratio
    assert math.log(found) == pytest.approx(2.802 * 0.1 / math.sqrt(5000), rel=1e-3)


BASELINE, SUBJECT = [10.0, 11.0, 12.5, 9.5, 10.2], [8.0, 9.4, 10.0, 8.1, 8.3]


def test_paired_against_scipy_and_by_hand() -> None:
    found, logs = paired(BASELINE, SUBJECT), np.log(BASELINE) - np.log(SUBJECT)
    reference = stats.ttest_rel(np.log(BASELINE), np.log(SUBJECT))
    interval = reference.confidence_interval(0.95)
    assert found.ratio == pytest.approx(stats.gmean(BASELINE) / stats.gmean(SUBJECT), rel=1e-12)
    assert found.ci95 == pytest.approx((math.exp(interval.low), math.exp(interval.high)), rel=1e-10)
    assert found.t == pytest.approx(reference.statistic, rel=1e-10)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert found.cohens_d == pytest.approx(logs.mean() / logs.std(ddof=1), rel=1e-10)
    # Means 10.64 and 8.76; variances 1.373 and 0.793, 1.083 in the mean.
    assert found.cohens_d_pooled == pytest.approx(1.88 / math.sqrt(1.083), rel=1e-10)
    assert found.pairs == 5
    low, high = found.bootstrap95
    assert found.ci95[0] < low < found.ratio < high < found.ci95[1]


def test_ratio_of_a_constant_factor_is_exact() -> None:
    ratio = ratio_interval([2.0, 6.0, 10.0], [1.0, 3.0, 5.0])
    assert ratio.ratio == pytest.approx(2, rel=1e-15)
    assert ratio.ci95 == pytest.approx((2, 2), rel=1e-12)  # exp(log) rounds
    assert ratio.pairs == 3


def test_a_difference_without_scatter_is_certain() -> None:
    """Also where rounding scatters: 3.3 / 3 is not the float 1.1."""
    found = paired([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert (found.t, found.p, found.cohens_d, found.minimum_detectable_ratio) == (None, 0, None, 1)
    assert found.bootstrap95 == pytest.approx((1.1, 1.1), rel=1e-12)
    assert found.cohens_d_pooled is not None  # the times themselves do scatter
    assert paired([1.1] * 3, [1.0] * 3).cohens_d_pooled is None
    dumps(asdict(found), allow_nan=False)


def test_no_difference_and_no_scatter() -> None:
    found = paired([0.1] * 3, [0.1] * 3)
    assert (found.ratio, found.ci95, found.bootstrap95) == (1, (1, 1), (1, 1))
    assert (found.t, found.p, found.cohens_d, found.cohens_d_pooled) == (0, 1, 0, 0)
    assert found.minimum_detectable_ratio == 1


positive = st.floats(1e-3, 1e3)
# No deadlines: a loaded machine lets any example wait.
pairs_of_times = st.lists(st.tuples(positive, positive), min_size=2, max_size=8)


@settings(deadline=None)
@given(pairs_of_times)
def test_the_inverse_ratio_has_the_inverse_interval(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = ratio_interval(a, b), ratio_interval(b, a)
    assert there.ratio == pytest.approx(1 / back.ratio, rel=1e-9)  # rounding of logs and sums
    assert there.ci95[0] == pytest.approx(1 / back.ci95[1], rel=1e-6)  # amplified by t = 12.7 with two pairs
    assert there.ci95[0] <= there.ratio <= there.ci95[1]


# Pairs that scatter visibly: of others t is rounding.
scattered = pairs_of_times.filter(lambda pairs: np.std([math.log(a / b) for a, b in pairs]) > 1e-6)


@settings(deadline=None)
@given(scattered)
def test_swapping_the_methods_turns_the_signs(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = paired(a, b), paired(b, a)
    assert there.t is not None
    assert back.t is not None
    assert there.t == pytest.approx(-back.t, rel=1e-6, abs=1e-6)
    assert there.p == pytest.approx(back.p, rel=1e-4, abs=1e-6)
    assert there.cohens_d_pooled == pytest.approx(-(back.cohens_d_pooled or 0.0), rel=1e-6, abs=1e-6)
    assert there.bootstrap95[0] == pytest.approx(1 / back.bootstrap95[1], rel=1e-9)
    assert there.minimum_detectable_ratio == pytest.approx(back.minimum_detectable_ratio, rel=1e-6)
    assert there.bootstrap95[0] * (1 - 1e-9) <= there.ratio <= there.bootstrap95[1] * (1 + 1e-9)


@settings(deadline=None)
@given(scattered, st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(pairs: list[tuple[float, float]], unit: float) -> None:
    a, b = zip(*pairs, strict=True)
    found = asdict(paired(a, b))
    assert asdict(paired([x * unit for x in a], [x * unit for x in b])) == {
        key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in found.items()
    }


@settings(deadline=None)
@given(scattered)
def test_a_small_p_is_an_interval_that_leaves_1_out(pairs: list[tuple[float, float]]) -> None:
    found = paired(*zip(*pairs, strict=True))
    low, high = found.ci95
    if abs(found.p - 0.05) > 1e-6:
        assert (found.p < 0.05) == (not low <= 1 <= high)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_run_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"at least 2 runs, not {len(values)}"):
        summarize(values)
    with pytest.raises(ValueError, match=f"at least 2 runs, not {len(values)}"):
        ratio_interval(values, values)
    with pytest.raises(ValueError, match=f"at least 2 runs, not {len(values)}"):
        paired(values, values)


def test_runs_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="finite"):
        summarize([1.0, math.nan])


@pytest.mark.parametrize(("a", "b", "message"), [([1, 2], [1], "not 2 and 1"), ([1, 0], [1, 1], "above 0")])
def test_ratio_refuses(a: list[float], b: list[float], message: str) -> None:
    for compare in (ratio_interval, paired):
        with pytest.raises(ValueError, match=message):
            compare(a, b)
