"""The protocol of a generation: one answer that is streamed, then runs in which the methods take turns.

A run has, of each method, a few recorded tokens and `iterations` timed answers to all prompts; every second timed pass
goes through the methods backwards (`helix.study.turns`). Recording keeps every collective, which the timed answers do
without.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist

from helix.checkpoint.content import CheckpointError
from helix.config.schema import ParallelConfig, WorkloadConfig
from helix.flight.activity import enter
from helix.generation.contenders import Contender, Source, contender
from helix.generation.errors import CannotRun, Diverged
from helix.generation.passes import Heard, Moment, Steps, Task, answer, answer_recorded, check_agreement
from helix.generation.views import View, make_printable, view_for
from helix.partition.grid import PartitionError
from helix.ranks.hosts import own_host
from helix.study.memory import PeakMemory
from helix.study.progress import progress_bar
from helix.study.tracking import Tracker
from helix.study.trial import Refused, together
from helix.study.turns import Kind, take_turns


@dataclass
class Found:
    """What one rank found of one method.

    Args:
        host: names the machine, whose ranks share a clock.
        layers: of the model.
        weight_bytes, cache_bytes: of this rank; the cache at the end of the largest batch's answer.
        growth_bytes: of this rank's memory over the first answer, its cache included; see `PeakMemory`.
        idle_ranks: ranks of the launch that the method left without work.
        timed: of each run, for each answered batch the seconds at its beginning and at each token.
        counts: tokens of each answer, batch by batch.
        moments: of each run, the recorded steps, the prompt's first.
        tokens, texts: of each answer, in the order of the prompts; the same in every run.
        steps: the last recorded ones; on rank 0.
    """

    host: str
    weight_bytes: int
    idle_ranks: int
    cache_bytes: int = 0
    growth_bytes: int = 0
    timed: list[list[tuple[float, tuple[float, ...]]]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    moments: list[list[Moment]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    steps: Steps | None = None

    def keep_answers(self, heard: list[Heard]) -> None:
        self.counts = [[one.count for one in each.answers] for each in heard]
        self.tokens = [one.tokens for each in heard for one in each.answers]
        self.texts = [one.text for each in heard for one in each.answers]


@dataclass(frozen=True)
class Protocol:
    """The methods by name, the first one being the main one, and how often each answers."""

    layouts: dict[str, ParallelConfig]
    work: WorkloadConfig


def measure(
    protocol: Protocol, source: Source, task: Task, tracker: Tracker
) -> tuple[dict[str, Found], dict[str, str], dict[str, Contender]]:
    """Run the protocol. All ranks call it.

    Returns:
        what this rank found of each method that runs; the words of those that refused; the methods that run.
    """
    view: View | None = None
    if dist.get_rank() == 0:
        make_printable()
        view = view_for(len(task.prompts.texts), task.generate.chat)
    running: dict[str, Contender] = {}
    found: dict[str, Found] = {}
    refusals: dict[str, str] = {}
    for number, (name, layout) in enumerate(protocol.layouts.items()):
        enter("load")
        try:
            running[name] = together(partial(contender, source, layout))
            found[name] = Found(own_host(), running[name].weight_bytes(), running[name].idle_ranks)
            enter("generation, warm-up")
            for _ in range(protocol.work.warmup):
                _warm_up(task, running[name], found[name], view)
                view = None  # only the first answers of the main method are shown
        except Refused as refused:
            if number == 0:
                if isinstance(refused.__cause__, (PartitionError, CheckpointError, Diverged)):
                    raise refused.__cause__ from None
                raise CannotRun(f"{name} cannot run: {refused}") from refused.__cause__
            for each in (running, found):
                each.pop(name, None)
            refusals[name] = str(refused)
            gc.collect()
    _take_turns(protocol, task, running, found, tracker)
    return found, refusals, running


def _warm_up(task: Task, each: Contender, found: Found, view: View | None) -> None:
    """Answer everything once; what fails on one rank fails on all, before any has gone on to the next collective.

    Raises:
        Refused: on every rank.
    """
    memory = PeakMemory(task.device)
    heard = [together(partial(answer, task, each, which, view)) for which in task.prompts.batches]
    together(partial(check_agreement, heard, each))
    found.growth_bytes = max(found.growth_bytes, memory.growth())
    found.cache_bytes = max(one.cache_bytes for one in heard)
    found.keep_answers(heard)


def _take_turns(
    protocol: Protocol,
    task: Task,
    running: dict[str, Contender],
    found: dict[str, Found],
    tracker: Tracker,
) -> None:
    work = protocol.work
    turns = list(take_turns(list(running), 0, work.iterations, work.runs))
    metrics: dict[str, float] = {}
    with progress_bar(stderr=True) as progress:
        bar = progress.add_task("", total=len(turns))
        for turn in turns:
            run = f"run {turn.run + 1} of {work.runs}"
            enter(f"generation, {run}")
            progress.update(bar, description=f"{run}: {turn.method}")
            progress.refresh()
            each, own = running[turn.method], found[turn.method]
            if turn.kind is Kind.RECORDED:
                recorded = answer_recorded(task, each, task.prompts.batches[0])
                own.moments.append(recorded.moments)
                own.steps = recorded.steps if dist.get_rank() == 0 else None
            else:
                heard = [answer(task, each, which) for which in task.prompts.batches]
                check_agreement(heard, each)
                own.cache_bytes = max(own.cache_bytes, *(one.cache_bytes for one in heard))
                own.keep_answers(heard)
                if len(own.timed) <= turn.run:
                    own.timed.append([])
                own.timed[turn.run] += [(one.begin_s, tuple(one.token_s)) for one in heard]
                if dist.get_rank() == 0:
                    metrics |= _metrics("" if turn.method == next(iter(running)) else f"{turn.method}/", heard)
            progress.advance(bar)
            if turn.ends_pass and metrics:
                tracker.log({"run": turn.run} | metrics, step=turn.batch)
                metrics = {}


def _metrics(prefix: str, heard: list[Heard]) -> dict[str, float]:
    """Of one pass on rank 0, for the W&B run."""
    times = phases([(one.begin_s, tuple(one.token_s)) for one in heard])
    out = {f"{prefix}ttft_ms": times[0] * 1e3}
    return out if times[1] is None else out | {f"{prefix}tpot_ms": times[1] * 1e3}


def phases(batches: list[tuple[float, tuple[float, ...]]]) -> tuple[float, float | None]:
    """Mean seconds to a first token, and mean seconds of a token after it, over the answers to some batches.

    The latter is None where no answer has a second token.
    """
    first = sum(tokens[0] - begin for begin, tokens in batches) / len(batches)
    steps = sum(len(tokens) - 1 for _, tokens in batches)
    return first, sum(tokens[-1] - tokens[0] for _, tokens in batches) / steps if steps else None
