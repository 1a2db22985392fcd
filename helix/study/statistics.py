"""What repeated runs say: mean, spread and Student-t intervals.

The sample is the run, not the iteration: iterations of one run share its warm caches and its neighbours'
load, so an interval over them is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Summary:
    """One figure over several runs.

    Args:
        runs: the figure of each run, in the order in which they ran.
        mean, sd: sample mean and sample standard deviation (n - 1), in the figure's own unit.
        ci95: 95 % t-interval of the mean.
        cv: sd / mean, without unit; None where the mean is 0.
    """

    runs: tuple[float, ...]
    mean: float
    sd: float
    ci95: tuple[float, float]
    cv: float | None


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


def summarize(values: Sequence[float]) -> Summary:
    """Summarize one figure over its runs.

    Raises:
        ValueError: with fewer than two runs, which have no interval, or with a value that is not finite.
    """
    runs = tuple(float(value) for value in values)
    mean, sd, half = _t_interval(runs)
    return Summary(runs, mean, sd, (mean - half, mean + half), sd / abs(mean) if mean else None)


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Compare two figures measured alternately, a[i] right beside b[i], so that pairs share the machine's mood.

    The interval is a t-interval of log(a / b): a ratio and its inverse get the same treatment.

    Raises:
        ValueError: with unequal lengths, fewer than two pairs, or a value that is not above 0.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need equally many runs, not {len(a)} and {len(b)}")
    if not all(value > 0 for value in (*a, *b)):
        raise ValueError("a ratio needs values above 0")
    mean, _, half = _t_interval([math.log(x / y) for x, y in zip(a, b, strict=True)])
    return Ratio(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)), len(a))


def _t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard deviation and half the width of the mean's 95 % t-interval."""
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval needs at least 2 runs, not {count}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"runs must be finite numbers, not {list(values)}")
    mean = math.fsum(values) / count
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, sd, float(stats.t.ppf(0.975, count - 1)) * sd / math.sqrt(count)
