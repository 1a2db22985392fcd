"""What repeated runs say: mean, spread, intervals, and whether two methods that took turns differ.

The sample is the run, not the iteration: iterations of one run share its warm caches and its neighbours'
load, so an interval over them is too narrow.

Every figure has two intervals of 95 %. The one to quote is Student's t. The other is the percentile bootstrap,
which assumes no distribution but cannot know more than the few values that it draws from: of normal runs it
holds the truth in 83.5 % of the cases with 5 of them and in 93.5 % with 30 (tests/test_statistics.py). Tried and
rejected: the BCa bootstrap (83.8 % and 93.8 % of the same), which is undefined where all runs are equal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Runs: TypeAlias = NDArray[np.float64]

ALPHA = 0.05  # two-sided: what every interval leaves out, and what every test risks
POWER = 0.8
RESAMPLES = 9999
# Times of one constant ratio have logs of ratios that differ by rounding, 1e-16; those of clocks by 1e-9 or more.
ROUNDING = 1e-14


@dataclass(frozen=True)
class Summary:
    """One figure over several runs.

    Args:
        runs: the figure of each run, in the order in which they ran.
        mean, sd: sample mean and sample standard deviation (n - 1), in the figure's own unit.
        ci95: 95 % t-interval of the mean.
        cv: sd / mean, without unit; None where the mean is 0.
        bootstrap95: 95 % percentile bootstrap interval of the mean, the same for the same runs. With 5 runs it
            holds the mean in 83.5 % of the cases only, so quote ci95.
    """

    runs: tuple[float, ...]
    mean: float
    sd: float
    ci95: tuple[float, float]
    cv: float | None
    bootstrap95: tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """How many times b the figure a is, over paired runs.

    Args:
        ratio: geometric mean of a / b.
        ci95: its 95 % t-interval; 1 outside of it is a difference.
        pairs: number of pairs.
    """

    ratio: float
    ci95: tuple[float, float]
    pairs: int


@dataclass(frozen=True)
class Paired(Ratio):
    """How many times as fast a subject is as the baseline that it took turns with, and how sure that is.

    Without any scatter (standard deviation within rounding) an infinite t and d is None, with p = 0, or 0 with
    p = 1 where there is no difference either; any ratio but 1 is then detectable, so the minimum is 1.

    Args:
        bootstrap95: 95 % percentile bootstrap interval of the ratio; too narrow with few pairs, as in `Summary`.
        t, p: two-sided paired t-test of log(baseline / subject) against 0; p < 0.05 where ci95 leaves 1 out.
        cohens_d: of the pairs: mean / sd of log(baseline / subject). What pairs share is not in it, so it is
            the larger one where they share much.
        cohens_d_pooled: of two groups, paired or not: difference of the mean times over their pooled sd
            (sqrt of the mean of both variances). What is meant where a paper gives means and sds of its groups.
        minimum_detectable_ratio: the smallest ratio above 1 that a t-test of as many pairs with this scatter
            finds with 80 % power. A scatter known from few pairs is itself uncertain, and so is this.
    """

    bootstrap95: tuple[float, float]
    t: float | None
    p: float
    cohens_d: float | None
    cohens_d_pooled: float | None
    minimum_detectable_ratio: float


def summarize(values: Sequence[float]) -> Summary:
    """Summarize one figure over its runs.

    Raises:
        ValueError: with fewer than two runs, which have no interval, or with a value that is not finite.
    """
    runs = _runs(values)
    mean, sd, half = (float(part) for part in t_interval(runs))
    low, high = (float(end) for end in _bootstrap_interval(runs))
    cv = sd / abs(mean) if mean else None
    return Summary(tuple(runs.tolist()), mean, sd, (mean - half, mean + half), cv, (low, high))


@dataclass(frozen=True)
class Typical:
    """The median of one figure over several passes, which one bad pass does not move.

    Args:
        low, high: its 95 % interval by order statistics, which assumes no distribution (and of 6 passes is their
            range).
        count: number of passes.
    """

    value: float
    low: float
    high: float
    count: int


def typical(values: Sequence[float]) -> Typical:
    """The median of a figure, and where the true one is.

    Raises:
        ValueError: with fewer than 6 values, of which even the range misses the median in more than 5 % of cases, or
            with a value that is not finite.
    """
    runs = _runs(values)
    interval = stats.quantile_test(runs, q=0.0, p=0.5).confidence_interval(1 - ALPHA)
    if not np.isfinite([interval.low, interval.high]).all():
        raise ValueError(f"an interval of the median needs at least 6 values, not {len(runs)}")
    return Typical(float(np.median(runs)), float(interval.low), float(interval.high), len(runs))


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Compare two figures measured alternately, a[i] right beside b[i], so that pairs share the machine's mood.

    The interval is a t-interval of log(a / b): a ratio and its inverse get the same treatment.

    Raises:
        ValueError: with unequal lengths, fewer than two pairs, or a value that is not above 0.
    """
    mean, _, half = t_interval(_log_ratios(a, b))
    return Ratio(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)), len(a))


def paired(baseline: Sequence[float], subject: Sequence[float]) -> Paired:
    """Compare the step times of two methods that took turns, baseline[i] and subject[i] of the same run.

    Raises:
        ValueError: as `ratio_interval`.
    """
    logs = _log_ratios(baseline, subject)
    mean, sd, _ = (float(part) for part in t_interval(logs))
    low, high = (math.exp(end) for end in _bootstrap_interval(logs))
    pairs = len(logs)
    d = _standardized(mean, sd)
    # scipy's ttest_1samp, which is the same, warns of logs that differ by little more than rounding.
    t = None if d is None else d * math.sqrt(pairs)
    return Paired(
        **asdict(ratio_interval(baseline, subject)),
        bootstrap95=(low, high),
        t=t,
        p=0.0 if t is None else float(2 * stats.t.sf(abs(t), pairs - 1)),
        cohens_d=d,
        cohens_d_pooled=_pooled_d(_runs(baseline), _runs(subject)),
        minimum_detectable_ratio=math.exp(_noncentrality(pairs) * sd / math.sqrt(pairs)) if sd > ROUNDING else 1.0,
    )


def _runs(values: Sequence[float]) -> Runs:
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 runs, not {len(values)}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"runs must be finite numbers, not {list(values)}")
    return np.asarray(values, dtype=np.float64)


def _log_ratios(a: Sequence[float], b: Sequence[float]) -> Runs:
    if len(a) != len(b):
        raise ValueError(f"pairs need equally many runs, not {len(a)} and {len(b)}")
    if not all(value > 0 for value in (*a, *b)):
        raise ValueError("a ratio needs values above 0")
    return _runs([math.log(x / y) for x, y in zip(a, b, strict=True)])


def t_interval(runs: Runs) -> tuple[Runs, Runs, Runs]:
    """Mean, standard deviation and half the width of the mean's 95 % t-interval; of each row, if there are rows."""
    count = runs.shape[-1]
    first = runs[..., 0]
    mean = first + (runs - first[..., None]).mean(-1)  # equal runs then have a mean without rounding, and sd 0
    sd = np.sqrt(((runs - mean[..., None]) ** 2).sum(-1) / (count - 1))
    return mean, sd, stats.t.ppf(1 - ALPHA / 2, count - 1) * sd / math.sqrt(count)


def _bootstrap_interval(runs: Runs, resamples: int = RESAMPLES) -> tuple[Runs, Runs]:
    """The 95 % percentile bootstrap interval of the mean; of each row, if there are rows."""
    mean, _, _ = t_interval(runs)
    found = stats.bootstrap(
        (runs - mean[..., None],),  # a sum of zeros does not round
        np.mean,
        n_resamples=resamples,
        batch=100,
        vectorized=True,
        axis=-1,
        confidence_level=1 - ALPHA,
        method="percentile",
        rng=0,  # one report from the same runs, always
    ).confidence_interval
    return mean + found.low, mean + found.high


def _standardized(difference: float, sd: float, size: float = 1.0) -> float | None:
    """Difference in standard deviations; rounding is relative to `size`. None if infinite."""
    if sd > ROUNDING * size:
        return difference / sd
    return 0.0 if abs(difference) <= ROUNDING * size else None


def _pooled_d(baseline: Runs, subject: Runs) -> float | None:
    (slow, slow_sd, _), (fast, fast_sd, _) = t_interval(baseline), t_interval(subject)
    pooled = math.sqrt((float(slow_sd) ** 2 + float(fast_sd) ** 2) / 2)
    return _standardized(float(slow - fast), pooled, size=float(max(slow, fast)))


@functools.cache
def _noncentrality(pairs: int) -> float:
    """The true mean, in standard errors, that a two-sided t-test of so many pairs finds with 80 % power.

    A difference found with the wrong sign does not count. It is below 1e-5 here, and scipy 1.17 has NaN for it.
    """
    critical = stats.t.ppf(1 - ALPHA / 2, pairs - 1)

    def lacks(mean: float) -> float:
        return float(stats.nct.sf(critical, pairs - 1, mean)) - POWER

    # Two pairs, the worst case, need 16.3; many need the normal distribution's 2.8.
    return float(optimize.brentq(lacks, 1.0, 20.0))
