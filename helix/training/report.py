"""`train_report.json`: what one training did, and its table. Units are in the names."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.planner.chosen import Chosen
from helix.study.between import hosts_line
from helix.study.provenance import command, git_commit, versions
from helix.study.report import MethodLabel, Tracked, plain, write_whole
from helix.study.table import chosen_line
from helix.study.traffic import HostRanks
from helix.training.resuming import Resumed


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
        learning_rates, gradient_norms, loss_scales: of each of them; the norm before clipping, and null without; the
            scale after the step, and null but in 16-mixed.
        skipped_steps: their numbers, from 1: those in which some gradient overflowed.
        validations: in the order of their steps; the last one is after the last step.
        validation_bpb: the last one's.
        unigram_entropy_bpb: of the text's bytes: what a model that knows their frequencies alone would need.
        text, text_bytes: what was read, and how much of it.
        tokens_per_s: training tokens of all replicas a second, validations left out.
        wall_s: of the Trainer's fit: the model made or loaded, the steps, validations and checkpoints, up to the last
            of them; of a training that went on, since its ranks were last started.
        resumed: the times that this training went on, or began again, by `ckpt` or since its ranks were started again;
            the losses of all its pieces are in `losses`, those of each step once.
        parameters: of the model.
        model, data, optimizer, trainer: the composed config's groups as plain dicts.
        settings: `helix.config.schema.digest` of the configuration.
        chosen: what `parallel=auto` chose the layout for, and what was predicted of it.
        hosts: where there are several.
    """

    method: MethodLabel
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
    chosen: Chosen | None = None
    learning_rates: list[float] = field(default_factory=list)
    gradient_norms: list[float | None] = field(default_factory=list)
    loss_scales: list[float | None] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    resumed: list[Resumed] = field(default_factory=list)
    wandb: Tracked | None = None
    hosts: HostRanks | None = None
    versions: dict[str, str] = field(default_factory=versions)
    command: str = field(default_factory=command)
    git_commit: str | None = field(default_factory=git_commit)


def write(report: TrainReport, path: Path) -> Path:
    """Write `train_report.json`, whole or not at all. What is not finite becomes null: JSON has no infinity."""
    content = plain(report)
    if report.hosts is None:
        del content["hosts"]
    return write_whole(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def draw(report: TrainReport, path: Path) -> Path:
    """Draw the report's curves."""
    from helix.figures.style import save
    from helix.training.plots import draw_run

    return save(draw_run(plain(report)), path)


def show(report: TrainReport, console: Console | None = None) -> None:
    """Print the table of a report."""
    (console or Console()).print(render(report))


def render(report: TrainReport) -> Group:
    """The table of a report, for any rich console; readable from 80 columns up."""
    parts: list[RenderableType] = [_headline(report), Text(), _curve(report), Text(), _figures(report)]
    if not math.isnan(report.tokens_per_s):
        parts += chosen_line(report.chosen, _batch_ms(report))
    if report.wandb is not None and report.wandb.path is not None:
        parts.append(
            Text(f"W&B ({report.wandb.mode}): {report.wandb.path}", style="dim", no_wrap=True, overflow="fold")
        )
    return Group(*parts)


def _batch_ms(report: TrainReport) -> float:
    """Time of one batch, forward and backward; an optimizer's step may have several."""
    return report.data["batch_size"] * report.data["seq_len"] / report.tokens_per_s * 1e3


def _headline(report: TrainReport) -> Text:
    method, data = report.method, report.data
    ranks = "1 rank" if report.world_size == 1 else f"{report.world_size} ranks"
    replicas = f" x {method.data} replicas" if method.data > 1 else ""
    line = Text()
    line.append(method.name, style="bold")
    if method.schedule.prefill is None:
        stages = f" x {method.stage} pipeline stages" if method.stage > 1 else ""
        line.append(f"  tensor parallelism over {method.n} ranks{stages}{replicas}, {ranks}\n")
    else:
        line.append(f"  {method.m} slices x {method.n} head groups{replicas}, schedule ")
        line.append(method.schedule.prefill, style="bold")
        line.append(f", {ranks}\n")
    line.append(f"model {report.model['name']}, {report.parameters:,} parameters, {report.precision}, ")
    sequences = data["batch_size"] * report.trainer["accumulate_grad_batches"]
    line.append(f"steps of {sequences} x {data['seq_len']} tokens, seed {report.seed}\n")
    line.append(f"text: {report.text}, {report.text_bytes:,} bytes")
    if report.hosts is not None:
        line.append_text(Text("\n") + hosts_line(report.hosts))
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
    began = report.resumed[-1].step if report.resumed else 0
    line.append(f"{report.steps - began} steps in {report.wall_s:.1f} s")
    if not math.isnan(report.tokens_per_s):
        line.append(f", {report.tokens_per_s:,.0f} tokens/s while training")
    for piece in report.resumed:
        went_on = f"went on after step {piece.step}, from {piece.checkpoint}" if piece.checkpoint else "began anew"
        line.append(f"\n{went_on}{f' ({piece.reason})' if piece.reason else ''}")
    return line
