"""The planner's predictions against what this machine's ranks do: step times, memory, bytes, and its choice.

Each case is one launch's worth of layouts that take turns (`helix.study.alternate`), after each has proved itself
against the single-device model (`helix.study.trial`), which also counts its bytes and its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

import torch
from scipy import stats

from helix.calibration.cases import Case, named
from helix.comm.launch import launch
from helix.config.methods import to_name
from helix.config.schema import expert_parallel, to_grid, to_options, to_shape
from helix.parallel.methods.build import load
from helix.parallel.methods.method import Job, Layout
from helix.study.accuracy import Oracle
from helix.study.alternate import Rounds, Spans, alternate, step_ms
from helix.study.inference import DTYPES
from helix.study.statistics import summarize
from helix.study.text import byte_batches, corpus
from helix.study.trial import Refused, Trial, try_out

WITHIN = 0.1  # of the best measured layout, where a choice counts as good
TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """One layout's step, predicted and measured.

    Args:
        case: the work and the ranks, in words; layout: by its name, with its schedule.
        predicted_ms, measured_ms: of a step; the median of rounds, with its 95 % interval over them.
        predicted_bytes, measured_bytes: of memory of the fullest rank, weights and what the first step added.
        bytes_agree: whether every rank sent as many bytes by each collective as the closed forms say.
    """

    case: str
    layout: str
    predicted_ms: float
    measured_ms: float
    measured_ci95: tuple[float, float]
    predicted_bytes: float
    measured_bytes: int
    bytes_agree: bool

    @property
    def error(self) -> float:
        """Part by which the predicted time is above the measured one."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def memory_error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


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
    def error(self) -> float:
        """Median absolute error of times."""
        return median(abs(one.error) for one in self.outcomes)

    @property
    def memory_error(self) -> float:
        return median(abs(one.memory_error) for one in self.outcomes)

    @property
    def bytes_agree(self) -> bool:
        return all(one.bytes_agree for one in self.outcomes)

    @property
    def choices(self) -> list[Choice]:
        """Of each case."""
        found = []
        for case, group in groupby(self.outcomes, lambda one: one.case):
            chosen, *others = group
            best = min((chosen, *others), key=lambda one: one.measured_ms)
            found.append(Choice(case, chosen.layout, best.layout, chosen.measured_ms / best.measured_ms))
        return found

    @property
    def good_choices(self) -> float:
        """Part of the cases whose choice is within 10 % of the best."""
        choices = self.choices
        return sum(one.good for one in choices) / len(choices)


def validate(hardware: str, cases: Sequence[Case], device: str, rounds: Rounds) -> Validation:
    """Run every case; all cases of as many ranks share a launch.

    Raises:
        RankError: if a rank was killed.
    """
    load({"helix"}, True, device)
    outcomes: list[Outcome] = []
    for ranks, group in groupby(cases, lambda case: case.ranks):
        these = list(group)
        found = launch(_rank, these, rounds, ranks=ranks, device=device, timeout_s=TIMEOUT_S)
        for case, answers in zip(these, zip(*found, strict=True), strict=True):
            outcomes += _outcomes(case, answers)
    return Validation(hardware, tuple(outcomes))


# Of one rank and case: each layout's trial, and the steps of its turns.
Answer = tuple[dict[str, Trial], Spans]


def _rank(cases: Iterable[Case], rounds: Rounds) -> list[Answer]:
    return [_measure(case, rounds) for case in cases]


def _measure(case: Case, rounds: Rounds) -> Answer:
    """What each rank does for one case. Layouts that cannot run after all are left out, on every rank alike."""
    cuda = torch.cuda.is_available() and torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    work, shape = case.work, to_shape(case.model)
    job = Job(shape, work.batch, work.length, DTYPES[work.precision], device, rounds.seed)
    tokens = torch.from_numpy(byte_batches(corpus(None), work.batch, work.length, 1, rounds.seed))[0].to(device)
    oracle, trials, steps = Oracle(job, tokens.cpu()), {}, {}
    for estimate in case.estimates:
        parallel = named(estimate.layout)
        options = to_options(parallel, estimate.layout.prefill)
        ep_size = expert_parallel(case.model, parallel)
        layout = Layout(to_grid(parallel), parallel.data, parallel.stage, options, ep_size, parallel.microbatches)
        try:
            method, trial = try_out(parallel.method, layout, job, tokens, oracle)
        except Refused:
            continue
        trials[to_name(parallel)] = trial

        def step(method: object = method) -> None:
            with torch.inference_mode():
                method.step(tokens)  # type: ignore[attr-defined]
            if cuda:
                torch.cuda.synchronize()

        steps[to_name(parallel)] = step
    return trials, alternate(steps, rounds)


def _outcomes(case: Case, ranks: Sequence[Answer]) -> list[Outcome]:
    times = step_ms([spans for _, spans in ranks])
    found = []
    for estimate in case.estimates:
        name = to_name(named(estimate.layout))
        if name not in times:
            continue
        trials = [each[name] for each, _ in ranks]
        found.append(
            Outcome(
                case.name,
                name,
                estimate.seconds.total * 1e3,
                median(times[name]),
                summarize(times[name]).ci95,
                estimate.memory.total,
                max(one.weight_bytes + one.activation_bytes for one in trials),
                all(one.predicted is None or one.executed == one.predicted for one in trials),
            )
        )
    return found
