"""What predictions came to: each layout's figures beside each other, and the planner's choices."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean, median
from typing import Any

from scipy import stats

WITHIN = 0.1  # of the best measured layout, where a choice counts as good


@dataclass(frozen=True)
class Outcome:
    """One layout's step, predicted and measured.

    Args:
        case: the work and the ranks, in words; layout: by its name, with its schedule.
        ranks: of the launch.
        chosen: whether it is the one of its case that should be the fastest.
        predicted_ms, measured_ms: of a step; the median of rounds, with its 95 % interval over them.
        estimated_bytes, traced_bytes, measured_bytes: weights and the peak of a step's tensors on rank 0, by
            the planner's closed form, by a dry run (None of methods that it cannot trace), and by the allocator.
        bytes_agree: whether every rank sent as many bytes by each collective as the closed forms say.
    """

    case: str
    layout: str
    ranks: int
    chosen: bool
    predicted_ms: float
    measured_ms: float
    measured_ci95: tuple[float, float]
    estimated_bytes: float
    traced_bytes: float | None
    measured_bytes: int
    bytes_agree: bool

    @property
    def error(self) -> float:
        """Part by which the predicted time is above the measured one."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def memory_error(self) -> float | None:
        """Part by which the dry run's memory is above the measured one."""
        return None if self.traced_bytes is None else self.traced_bytes / self.measured_bytes - 1

    @property
    def estimate_error(self) -> float:
        """Part by which the closed form's memory is above the measured one."""
        return self.estimated_bytes / self.measured_bytes - 1


@dataclass(frozen=True)
class Choice:
    """The planner's choice of one case.

    Args:
        times_best: its measured time over that of the best measured layout.
    """

    case: str
    chosen: str
    best: str
    times_best: float

    @property
    def good(self) -> bool:
        return self.times_best <= 1 + WITHIN


@dataclass(frozen=True)
class Validation:
    """All outcomes of one hardware file on one machine."""

    hardware: str
    outcomes: tuple[Outcome, ...]

    @property
    def tau(self) -> float:
        """Kendall's rank correlation of predicted with measured times, over all layouts of all cases."""
        found = stats.kendalltau(
            [one.predicted_ms for one in self.outcomes], [one.measured_ms for one in self.outcomes]
        )
        return float(found.statistic)

    @property
    def tau_within(self) -> float:
        """The same within each case, whose sizes are alike; the mean of all cases."""
        found = []
        for _, group in groupby(self.outcomes, lambda one: one.case):
            these = list(group)
            if len(these) > 1:
                times = [one.predicted_ms for one in these], [one.measured_ms for one in these]
                found.append(float(stats.kendalltau(*times).statistic))
        return fmean(found)

    @property
    def error(self) -> float:
        """Median absolute error of times."""
        return median(abs(one.error) for one in self.outcomes)

    @property
    def memory_error(self) -> float:
        """Median absolute error of the dry run's memory; not a number if it knows none of the layouts."""
        found = [abs(one.memory_error) for one in self.outcomes if one.memory_error is not None]
        return median(found) if found else math.nan

    @property
    def estimate_error(self) -> float:
        """Median absolute error of the closed form's memory."""
        return median(abs(one.estimate_error) for one in self.outcomes)

    @property
    def bytes_agree(self) -> bool:
        return all(one.bytes_agree for one in self.outcomes)

    @property
    def choices(self) -> list[Choice]:
        """Of each case."""
        found = []
        for case, group in groupby(self.outcomes, lambda one: one.case):
            these = list(group)
            best = min(these, key=lambda one: one.measured_ms)
            chosen = next((one for one in these if one.chosen), None)
            if chosen is None:  # it could not run after all
                found.append(Choice(case, "what cannot run", best.layout, math.inf))
            else:
                found.append(Choice(case, chosen.layout, best.layout, chosen.measured_ms / best.measured_ms))
        return found

    @property
    def good_choices(self) -> float:
        """Part of the cases whose choice is within 10 % of the best."""
        choices = self.choices
        return sum(one.good for one in choices) / len(choices)

    def missed(
        self,
        least_tau: float | None = None,
        most_error: float | None = None,
        most_memory_error: float | None = None,
        least_good: float | None = None,
    ) -> list[str]:
        """The bounds that are missed, in words; bytes must agree in any case."""
        bounds = (
            (least_tau is not None and not self.tau >= least_tau, f"Kendall's tau {self.tau:.2f}, not {least_tau}"),
            (most_error is not None and self.error > most_error, f"median error {self.error:.3f}, not {most_error}"),
            (
                most_memory_error is not None and not self.memory_error <= most_memory_error,
                f"median error of memory {self.memory_error:.3f}, not {most_memory_error}",
            ),
            (
                least_good is not None and self.good_choices < least_good,
                f"good choices {self.good_choices:.2f}, not {least_good}",
            ),
            (not self.bytes_agree, "bytes differ"),
        )
        return [words for bad, words in bounds if bad]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in ms, memory in bytes."""
        return {
            "hardware": self.hardware,
            "kendall_tau": self.tau,
            "kendall_tau_within_cases": self.tau_within,
            "median_error": self.error,
            "median_memory_error": self.memory_error,
            "median_memory_estimate_error": self.estimate_error,
            "bytes_agree": self.bytes_agree,
            "good_choices": self.good_choices,
            "choices": [asdict(one) for one in self.choices],
            "outcomes": [asdict(one) for one in self.outcomes],
        }
