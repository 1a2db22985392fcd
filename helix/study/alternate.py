"""Alternatives that take turns, step by step, on the same ranks of one launch.

A round runs every alternative once in order and once in reverse (a b c c b a), so that a drift of the machine
falls on all of them alike, and the round is the sample: ratios are over pairs of one round. A step lasts from
the first rank's start to the last rank's end, by the clock that all ranks of one machine share; the barrier
before each step is not part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from helix.config.words import figure
from helix.study.progress import progress_bar
from helix.study.statistics import Ratio, ratio_interval, summarize

Step = Callable[[], Tensor]
# Of one rank: (start, end) of each step by each alternative, in seconds of the machine's monotonic clock.
Spans = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Rounds:
    """How long to measure: `rounds` of two steps of each alternative, after `warmup` steps of each."""

    rounds: int
    warmup: int
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """What the alternatives of one launch took.

    Args:
        title: what was measured, for the table.
        tokens: per step.
        step_ms: of each round, by alternative.
        errors: relative error (Frobenius norm) of each alternative's output against the exact one.
        baselines: the alternatives that ratios are to, the first one first.
    """

    title: str
    tokens: int
    step_ms: dict[str, list[float]]
    errors: dict[str, float]
    baselines: tuple[str, ...]

    def speed(self, name: str, baseline: str) -> Ratio:
        """How many times as fast as the baseline: its time over this one's, paired by round."""
        return ratio_interval(self.step_ms[baseline], self.step_ms[name])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "title": self.title,
            "tokens_per_step": self.tokens,
            "step_ms": {name: asdict(summarize(times)) for name, times in self.step_ms.items()},
            "relative_error": self.errors,
            "speed_ratio": {
                baseline: {name: asdict(self.speed(name, baseline)) for name in self.step_ms if name != baseline}
                for baseline in self.baselines
            },
        }

    def table(self) -> Table:
        """The fastest first; ratios to the first baseline in a column, to the others below."""
        first, *others = self.baselines
        subject = next(iter(self.step_ms))
        caption = "\n".join(f"{subject} is {self._ratio(subject, other)} times as fast as {other}" for other in others)
        table = Table(title=self.title, title_justify="left", caption=caption or None, caption_justify="left")
        table.add_column("", no_wrap=True)
        for column in ("ms a step", "tokens/s", f"x {first} (95 %)", "relative error"):
            table.add_column(column, justify="right", no_wrap=True)
        means = {name: summarize(times).mean for name, times in self.step_ms.items()}
        for name, mean in sorted(means.items(), key=lambda item: item[1]):
            cells = (figure(mean), figure(self.tokens / mean * 1e3), self._ratio(name, first))
            table.add_row(name, *cells, f"{self.errors[name]:.1e}")
        return table

    def _ratio(self, name: str, baseline: str) -> str:
        if name == baseline:
            return "1"
        speed = self.speed(name, baseline)
        return f"{speed.ratio:.2f} ({speed.ci95[0]:.2f} .. {speed.ci95[1]:.2f})"


def alternate(steps: Mapping[str, Callable[[], object]], rounds: Rounds) -> Spans:
    """On every rank: run the steps in turn, and say when each began and ended here."""
    order = list(steps)
    spans: Spans = {name: [] for name in order}
    passes = [order if half == 0 else order[::-1] for _ in range(rounds.rounds) for half in range(2)]
    with progress_bar(stderr=True) as progress:
        task = progress.add_task("measuring", total=len(passes))
        for step in steps.values():
            for _ in range(rounds.warmup):
                step()
        for names in passes:
            for name in names:
                dist.barrier()
                start = time.monotonic()
                steps[name]()
                spans[name].append((start, time.monotonic()))
            progress.advance(task)
            progress.refresh()
    return spans


def step_ms(ranks: Sequence[Spans]) -> dict[str, list[float]]:
    """Each round's step time in ms by alternative, from the spans of all ranks: the mean of its two steps."""
    out = {}
    for name in ranks[0]:
        steps = zip(*(spans[name] for spans in ranks), strict=True)
        times = [max(end for _, end in step) - min(start for start, _ in step) for step in steps]
        out[name] = [(there + back) / 2 * 1e3 for there, back in zip(times[::2], times[1::2], strict=True)]
    return out
