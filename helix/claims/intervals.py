"""Checks of the papers' statistics: what their intervals, deviations, effect sizes and p-values say of each other.

Their protocol: "Standard deviation calculated across 5 independent runs", "95% confidence intervals using
t-distribution", "paired t-test".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy import stats

from helix.claims.outcome import Outcome
from helix.config.words import figure

CONFIDENCE = 0.975  # the upper end of a two-sided interval of 95 %


def _deviation(half: float, runs: int) -> float:
    """Standard deviation of the runs whose mean has a t-interval of so half a width."""
    return float(half * math.sqrt(runs) / stats.t.ppf(CONFIDENCE, runs - 1))


def cohens_d(before: float, after: float, half: float, runs: int, stated: float) -> Outcome:
    """Cohen's d of two groups whose means have equal intervals: the difference over their deviation."""
    sd = _deviation(half, runs)
    follows = abs(after - before) / sd
    apart = f"{figure(abs(after - before))} / {figure(sd)} = {follows:.3g}"
    words = f"+-{figure(half)} over {runs} runs: sd {figure(sd)}; {apart}"
    return Outcome(stated, follows, abs(follows / stated - 1) <= 0.1, f"{words}; stated: {stated:g}")


def p_of_effect(d: float, pairs: int, below: float, correlation: float = 0.5) -> Outcome:
    """The p of a paired t-test, by Cohen's d over the deviation of each group: t = d sqrt(pairs / (2 (1 - r))).

    Args:
        correlation: r of the pairs; at 0.5 d over the deviation of the differences is the same.
    """
    t, plain = d * math.sqrt(pairs / (2 * (1 - correlation))), d * math.sqrt(pairs)
    follows, uncorrected = (float(2 * stats.t.sf(each, pairs - 1)) for each in (t, plain))
    words = (
        f"d = {d:g} of {pairs} pairs over the differences' deviation: t = {plain:.2f}, p = {uncorrected:.4f}; over "
        f"the groups', of pairs that correlate by {correlation:g}: t = {t:.2f}, p = {follows:.4f}; stated: "
        f"p < {below:g}"
    )
    return Outcome(below, follows, follows < below, words)


def variation(mean: float, half: float, runs: int, stated: float, rounding: float = 0.0) -> Outcome:
    """Coefficient of variation of the runs behind an interval, at least; a bound of it may have been rounded."""
    sd = _deviation(half - rounding, runs)
    follows = sd / (mean + rounding)
    rounded = f", less {rounding:g} of rounding," if rounding else ""
    words = f"{figure(mean)} +- {figure(half)}{rounded} over {runs} runs: sd {figure(sd)}"
    return Outcome(
        stated, follows, follows < stated, f"{words}, at least {follows:.1%} of the mean; stated: < {stated:.0%}"
    )


def interval_of_change(
    before: float, after: float, half_before: float, half_after: float, stated: Sequence[float], rounding: float = 0.0
) -> Outcome:
    """The narrowest interval of a ratio that two intervals allow: that of runs which vary together entirely.

    Args:
        stated: its lower and upper end, in per cent.
        rounding: that any of the four figures may be off by.
    """
    offsets = (-rounding, rounding) if rounding else (0.0,)
    gaps = [
        (half_before + one) / before - (half_after + other) / after for one in offsets for other in offsets
    ]  # of the relative widths, with the signs of both extremes
    narrowest = 0.0 if min(gaps) < 0 < max(gaps) else min(map(abs, gaps))
    apart = math.hypot(half_before / before, half_after / after)
    ratio, half = after / before, (stated[1] - stated[0]) / 200
    words = (
        f"half a width of {half:.2%} stated; of independent runs {ratio * apart:.2%}, of runs that vary together "
        f"entirely {ratio * narrowest:.2%}"
    )
    return Outcome(half, ratio * narrowest, half >= ratio * narrowest, words)


ALL: tuple[Callable[..., Outcome], ...] = (cohens_d, p_of_effect, variation, interval_of_change)
