"""The planner's predictions against what this machine's ranks do: step times, memory, bytes, and its choice.

The layouts of a case take turns (`helix.study.alternate`), after each has proved itself against the single-device
model (`helix.study.trial`), which also counts its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from helix.calibration.cases import Case, tokens_of
from helix.calibration.outcomes import Outcome, Validation
from helix.config.schema import to_shape
from helix.dryrun.drawn import trace_step
from helix.dryrun.world import pretended
from helix.parallel.methods.build import load
from helix.parallel.methods.configured import DTYPES, resolve
from helix.parallel.methods.method import Job, Method
from helix.partition.grid import PartitionError
from helix.ranks.launch import launch
from helix.ranks.process_group import own_device
from helix.study.accuracy import Oracle
from helix.study.alternate import Rounds, Spans, alternate, step_ms
from helix.study.memory import peak_of_tensors
from helix.study.statistics import summarize
from helix.study.trial import Refused, Trial, try_out

TIMEOUT_S = 300


def validate(hardware: str, cases: Sequence[Case], device: str, rounds: Rounds) -> Validation:
    """Run every case, each in a launch of its own: process groups of many methods, once made, slow all that follow.

    Raises:
        RankError: if a rank was killed.
    """
    load({"helix"}, True, device)
    outcomes: list[Outcome] = []
    for case in cases:
        traced = _traced_bytes(case)
        found = launch(_measure, case, rounds, ranks=case.ranks, device=device, timeout_s=TIMEOUT_S)
        outcomes += _outcomes(case, traced, found)
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


def _measure(case: Case, rounds: Rounds) -> Answer:
    """What each rank does for one case. Layouts that cannot run after all are left out, on every rank alike."""
    work = case.job.workload
    device = own_device(case.job.device)
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
