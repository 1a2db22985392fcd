"""`train_report.json`: what one training did, and its table. Units are in the names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.command.sweep import SweepJob, labels, outcome, report_of
from helix.study.report import Method, Tracked, command, git_commit, plain, versions, write_whole


@dataclass(frozen=True)
class Validation:
    """Bits per byte of the held-out text after so many optimizer steps."""

    step: int
    bpb: float


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """One training.

    Args:
        steps: optimizer steps that were made; fewer than the trainer's `max_steps` if its `max_time` came first.
        losses: of each of them, in nats a token, before the step; without the experts' load-balancing loss.
        validations: in the order of their steps; the last one is after the last step.
        validation_bpb: the last one's.
        unigram_entropy_bpb: of the text's bytes: what a model that knows their frequencies alone would need.
        text, text_bytes: what was read, and how much of it.
        tokens_per_s: training tokens of all replicas a second, validations left out.
        wall_s: from the first batch to the end of the last validation.
        parameters: of the model.
        model, data, optimizer, trainer: the composed config's groups as plain dicts.
        settings: `helix.config.schema.digest` of the configuration.
    """

    method: Method
    world_size: int
    started_at: str
    steps: int
    losses: list[float]
    validations: list[Validation]
    validation_bpb: float
    unigram_entropy_bpb: float
    text: str
    text_bytes: int
    tokens_per_s: float
    wall_s: float
    parameters: int
    model: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    auxiliary_weight: float
    precision: str
    seed: int
    settings: str
    wandb: Tracked | None = None
    versions: dict[str, str] = field(default_factory=versions)
    command: str = field(default_factory=command)
    git_commit: str | None = field(default_factory=git_commit)


def write(report: TrainReport, path: Path) -> Path:
    """Write `train_report.json`, whole or not at all. What is not finite becomes null: JSON has no infinity."""
    return write_whole(json.dumps(plain(report), indent=2, allow_nan=False) + "\n", path)


def show(report: TrainReport, console: Console | None = None) -> None:
    """Print the table of a report."""
    (console or Console()).print(render(report))


def render(report: TrainReport) -> Group:
    """The table of a report, for any rich console; readable from 80 columns up."""
    parts: list[RenderableType] = [_headline(report), Text(), _curve(report), Text(), _figures(report)]
    if report.wandb is not None and report.wandb.path is not None:
        parts.append(
            Text(f"W&B ({report.wandb.mode}): {report.wandb.path}", style="dim", no_wrap=True, overflow="fold")
        )
    return Group(*parts)


def collect(folder: Path, jobs: Sequence[SweepJob]) -> None:
    """A sweep's end: a table of what its trainings reached."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(str(folder.name), overflow="fold")
    for column in ("steps", "validation, bits per byte", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, job in zip(labels(jobs), jobs, strict=True):
        report = report_of(job.folder, job.settings)
        if report is None:
            table.add_row(label, outcome(job).status, "-", "-")
        else:
            figures = f"{report['validation_bpb']:.3f}", f"{report['tokens_per_s']:,.0f}"
            table.add_row(label, str(report["steps"]), *figures)
    Console().print(table)


def _headline(report: TrainReport) -> Text:
    method, data = report.method, report.data
    ranks = "1 rank" if report.world_size == 1 else f"{report.world_size} ranks"
    replicas = f" x {method.data} replicas" if method.data > 1 else ""
    line = Text()
    line.append(method.name, style="bold")
    line.append(f"  {method.m} slices x {method.n} head groups{replicas}, schedule ")
    line.append(str(method.schedule.prefill), style="bold")
    line.append(f", {ranks}\n")
    line.append(f"model {report.model['name']}, {report.parameters:,} parameters, {report.precision}, ")
    sequences = data["batch_size"] * report.trainer["accumulate_grad_batches"]
    line.append(f"steps of {sequences} x {data['seq_len']} tokens, seed {report.seed}\n")
    line.append(f"text: {report.text}, {report.text_bytes:,} bytes")
    return line


def _curve(report: TrainReport) -> Table:
    """The validations, each with the mean training loss since the one before."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("step", "training, bits per byte", "validation, bits per byte"):
        table.add_column(column, justify="right", no_wrap=True)
    before = 0
    for each in report.validations:
        losses = report.losses[before : each.step]
        mean = f"{sum(losses) / len(losses) / math.log(2):.3f}" if losses else "-"
        table.add_row(str(each.step), mean, f"{each.bpb:.3f}")
        before = each.step
    return table


def _figures(report: TrainReport) -> Text:
    below = report.unigram_entropy_bpb - report.validation_bpb
    line = Text()
    line.append(f"{report.validation_bpb:.3f} bits per byte", style="bold")
    line.append(
        f" on held-out text, {abs(below):.3f} {'below' if below >= 0 else 'above'} the text's unigram entropy "
    )
    line.append(f"({report.unigram_entropy_bpb:.3f})\n")
    line.append(f"{report.steps} steps in {report.wall_s:.1f} s, {report.tokens_per_s:,.0f} tokens/s while training")
    return line
