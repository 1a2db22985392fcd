"""The planner's predictions against what this machine's ranks do: step times, memory, bytes, and its choice.

The layouts of a case take turns (`helix.study.alternate`), after each has proved itself against the single-device
model (`helix.study.trial`), which also counts its bytes; all cases of as many ranks share a launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from scipy import stats
from torch import Tensor

from helix.calibration.cases import Case, tokens_of
from helix.comm.launch import launch
from helix.config.schema import to_shape
from helix.dryrun.drawn import trace_step
from helix.dryrun.world import pretended
from helix.parallel.methods.build import load
from helix.parallel.methods.configured import DTYPES, resolve
from helix.parallel.methods.method import Job, Method
from helix.partition.grid import PartitionError
from helix.study.accuracy import Oracle
from helix.study.alternate import Rounds, Spans, alternate, step_ms
from helix.study.memory import peak_of_tensors
from helix.study.statistics import summarize
from helix.study.trial import Refused, Trial, try_out

WITHIN = 0.1  # of the best measured layout, where a choice counts as good
TIMEOUT_S = 300


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


def validate(hardware: str, cases: Sequence[Case], device: str, rounds: Rounds) -> Validation:
    """Run every case; all cases of as many ranks share a launch.

    Raises:
        RankError: if a rank was killed.
    """
    load({"helix"}, True, device)
    outcomes: list[Outcome] = []
    for ranks, group in groupby(cases, lambda case: case.ranks):
        these = list(group)
        traced = [_traced_bytes(case) for case in these]
        found = launch(_rank, these, rounds, ranks=ranks, device=device, timeout_s=TIMEOUT_S)
        for case, peaks, answers in zip(these, traced, zip(*found, strict=True), strict=True):
            outcomes += _outcomes(case, peaks, answers)
    return Validation(hardware, tuple(outcomes))


def _traced_bytes(case: Case) -> dict[str, float]:
    """Bytes of rank 0's tensors at their peak by a dry run, of each layout that it knows."""
    found = {}
    with pretended(case.ranks, case.job.hardware.devices_per_host or 1, direct=case.job.device == "cpu"):
        for name in case.layouts:
            settings = case.settings(name)
            with suppress(PartitionError, RuntimeError):
                found[name] = trace_step(settings, settings.parallel, None)[0].peak
    return found


@dataclass(frozen=True)
class Measured:
    """One rank's figures of one layout.

    Args:
        peak_bytes: of weights and of tensors that a step makes; on rank 0.
    """

    trial: Trial
    peak_bytes: int


# Of one rank and case: each layout's figures, and the steps of its turns.
Answer = tuple[dict[str, Measured], Spans]


def _rank(cases: Iterable[Case], rounds: Rounds) -> list[Answer]:
    return [_measure(case, rounds) for case in cases]


def _measure(case: Case, rounds: Rounds) -> Answer:
    """What each rank does for one case. Layouts that cannot run after all are left out, on every rank alike."""
    work = case.job.workload
    cuda = case.job.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    shape, dtype = to_shape(case.job.model), DTYPES[case.job.precision]
    job = Job(shape, work.batch_size, work.seq_len, dtype, device, case.job.seed)
    tokens = torch.from_numpy(tokens_of(case.job)).to(device)
    oracle = Oracle(job, tokens.cpu())
    measured: dict[str, Measured] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name in case.layouts:
        settings = case.settings(name)
        layout = resolve(settings, settings.parallel)
        try:
            method, trial = try_out(settings.parallel.method, layout, job, tokens, oracle)
        except Refused:
            continue
        steps[name] = partial(_step, method, tokens)
        measured[name] = Measured(trial, trial.weight_bytes + _peak(steps[name], device))
    return measured, alternate(steps, rounds)


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """Of rank 0, which is the one that a dry run traces; a profile of every rank would take longer than the steps."""
    if dist.get_rank() == 0:
        return peak_of_tensors(step, device)
    step()
    return 0


@torch.inference_mode()
def _step(method: Method, tokens: Tensor) -> None:
    method.step(tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()


def _outcomes(case: Case, traced: Mapping[str, float], ranks: Sequence[Answer]) -> list[Outcome]:
    times = step_ms([spans for _, spans in ranks])
    found = []
    for name, rounds in times.items():
        trials = [each[name].trial for each, _ in ranks]
        estimate = case.layouts[name]
        found.append(
            Outcome(
                case=case.name,
                layout=name,
                ranks=case.ranks,
                chosen=name == next(iter(case.layouts)),
                predicted_ms=estimate.seconds.total * 1e3,
                measured_ms=median(rounds),
                measured_ci95=summarize(rounds).ci95,
                estimated_bytes=estimate.memory.total,
                traced_bytes=traced.get(name),
                measured_bytes=ranks[0][0][name].peak_bytes,
                bytes_agree=all(one.predicted is None or one.executed == one.predicted for one in trials),
            )
        )
    return found
