"""From what every rank measured to the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from helix.config.methods import to_name
from helix.config.schema import ParallelConfig
from helix.parallel.methods.method import Layout
from helix.ranks.hosts import Hosts
from helix.study.between import between_hosts
from helix.study.measure import Measured, Recorded
from helix.study.report import Accuracy, Bubble, Measurement, Memory, MethodLabel, Rival, Schedules, Traffic
from helix.study.split import Parts, Step, split
from helix.study.statistics import Summary, paired, summarize
from helix.study.trial import Trial


@dataclass(frozen=True)
class RankResult:
    """What one rank has to say of one method; `host` names the machine, whose ranks share a clock."""

    host: str
    trial: Trial
    measured: Measured


def describe(parallel: ParallelConfig, layout: Layout) -> MethodLabel:
    """A method as reports name it; only Helix has schedules."""
    schedule = layout.options.schedule if parallel.method == "helix" else None
    m, n = layout.grid.m, layout.grid.n
    return MethodLabel(to_name(parallel), m, n, Schedules(schedule), layout.data, layout.stage)


def measurement(
    method: MethodLabel, ranks: Sequence[RankResult], tokens: int, hosts: Hosts | None = None
) -> Measurement:
    """The figures of one method from those of all ranks.

    Args:
        ranks: in their order.
        tokens: of one step.
        hosts: of the ranks.
    """
    step_s = step_seconds(ranks)
    comm, wait, compute = _parts(ranks, tokens)
    return Measurement(
        method=method,
        tokens_per_s=summarize((tokens / step_s).tolist()),
        step_ms=summarize((step_s * 1e3).tolist()),
        comm_ms_per_token=comm,
        wait_ms_per_token=wait,
        compute_ms_per_token=compute,
        memory_bytes_per_rank=_memory([rank.trial for rank in ranks]),
        comm_bytes_per_rank_per_step=_traffic([rank.trial for rank in ranks]),
        accuracy=_accuracy(ranks[0].trial),
        idle_ranks=ranks[0].trial.idle_ranks,
        bubble=_bubble(ranks),
        between_hosts=None if hosts is None else between_hosts(hosts, [rank.trial for rank in ranks]),
    )


def rival(found: Measurement, main: Measurement) -> Rival:
    """A baseline's figures with the comparison to the main method, paired by run."""
    own = {name: getattr(found, name) for name in Measurement.__dataclass_fields__}
    return Rival(**own, paired=paired(found.step_ms.runs, main.step_ms.runs))


def step_seconds(ranks: Sequence[RankResult]) -> np.ndarray:
    """Mean step of each run, [runs]: from the first rank's start to the last one's end.

    Ranks of several machines have no common clock; there it is the slowest rank's own time.
    """
    spans = np.array([rank.measured.steps for rank in ranks])  # [ranks, runs, iterations, 2]
    if _share_clock(ranks):
        steps = spans[..., 1].max(0) - spans[..., 0].min(0)
    else:
        steps = (spans[..., 1] - spans[..., 0]).max(0)
    return np.asarray(steps.mean(-1))


def _parts(ranks: Sequence[RankResult], tokens: int) -> tuple[Summary | None, Summary | None, Summary | None]:
    """Transfer, wait and compute of the recorded steps, ms a token on the mean rank; None without a common clock."""
    parts: list[Parts] = []
    for run in range(len(ranks[0].measured.recorded)):
        steps = []
        for rank in ranks:
            recorded = rank.measured.recorded[run]
            steps.append(Step(recorded.start_s, recorded.end_s, recorded.spans, rank.host))
        found = split(steps)
        if found is None:
            return None, None, None
        parts.append(found.mean)
    ms = 1e3 / tokens
    return (
        summarize([each.transfer_s * ms for each in parts]),
        summarize([each.wait_s * ms for each in parts]),
        summarize([each.compute_s * ms for each in parts]),
    )


def _share_clock(ranks: Sequence[RankResult]) -> bool:
    return len({rank.host for rank in ranks}) == 1


def _memory(trials: Sequence[Trial]) -> Memory:
    heaviest = max(trials, key=lambda trial: trial.weight_bytes + trial.activation_bytes)
    return Memory(
        weights=heaviest.weight_bytes,
        activations_peak=heaviest.activation_bytes,
        peak=heaviest.weight_bytes + heaviest.activation_bytes,
        predicted=heaviest.predicted_weight_bytes,
    )


def _traffic(trials: Sequence[Trial]) -> Traffic:
    """One rank's bytes stand for all: one that disagrees with its closed form if there is any, else the busiest."""
    worst = max(
        trials,
        key=lambda trial: (
            trial.predicted is not None and trial.executed != trial.predicted,
            sum(trial.executed.values()),
        ),
    )
    return Traffic(worst.executed, worst.predicted)


def _accuracy(first: Trial) -> Accuracy:
    assert first.relative_error is not None, "rank 0 compares"
    return Accuracy(
        first.reference,
        first.relative_error,
        first.relative_error_to_h_heads,
        output_sha256=first.output_sha256,
    )


def _bubble(ranks: Sequence[RankResult]) -> Bubble | None:
    """Mean share of the recorded steps that a rank waits to receive, and after its own end."""
    predicted = ranks[0].trial.bubble
    if predicted is None:
        return None
    if not _share_clock(ranks):
        return Bubble(None, predicted)
    shares = []
    for run in range(len(ranks[0].measured.recorded)):
        steps = [rank.measured.recorded[run] for rank in ranks]
        start, end = min(step.start_s for step in steps), max(step.end_s for step in steps)
        idle = [end - step.end_s + _received_s(step) for step in steps]
        shares.append(np.mean(idle) / (end - start))
    return Bubble(float(np.mean(shares)), predicted)


def _received_s(step: Recorded) -> float:
    return sum(span.end_s - span.blocked_s for span in step.spans if span.key.startswith("recv/"))
