"""What `python -m helix bench checkpoint` measures: a checkpoint's save and load against the volume's lower bound.

The bound is what no checkpoint can do without: every rank writes as many bytes as its file has and has them on the
disk (`fsync`); every rank reads as many, and takes their sha256. All that a checkpoint adds is in the ratio: plans,
manifests, names, checksums, and the agreement of all ranks. Reads come from the page cache here.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch.optim import AdamW

from helix.checkpoint.save_and_load import BackgroundSaver, restore, save
from helix.comm.mesh import Mesh
from helix.models.transformer import Transformer
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.ranks.launch import launch
from helix.study.alternate import Rounds, Spans, alternate, step_ms
from helix.study.statistics import Ratio, ratio_interval, summarize

HANG_S = 300.0
# Each alternative and what it is held against.
BOUNDS = {"save": "bare write", "load": "bare read", "background save": "bare write", "held by it": "bare write"}


@dataclass(frozen=True)
class CheckpointCase:
    """A model on a grid, with AdamW's state.

    Args:
        folder: on the disk that is measured; what is written there is removed.
        background: whether saves in the background are measured too: until they are whole, and how long the caller
            waits (`held by it`).
    """

    shape: TransformerShape
    grid: Grid
    folder: Path
    background: bool = False


@dataclass(frozen=True)
class CheckpointComparison:
    """What they took.

    Args:
        nbytes: of the checkpoint's files, which all alternatives move.
        step_ms: of each round, by alternative.
    """

    title: str
    nbytes: int
    step_ms: dict[str, list[float]]

    def slowdown(self, name: str) -> Ratio:
        """How many times as long as its bound, paired by round."""
        return ratio_interval(self.step_ms[name], self.step_ms[BOUNDS[name]])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "title": self.title,
            "nbytes": self.nbytes,
            "step_ms": {name: asdict(summarize(times)) for name, times in self.step_ms.items()},
            "time_ratio": {
                name: {BOUNDS[name]: asdict(self.slowdown(name))} for name in self.step_ms if name in BOUNDS
            },
        }

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption_justify="left")
        table.caption = f"{self.nbytes / 1e6:.1f} MB each; ratios of times, paired by round"
        table.add_column("", no_wrap=True)
        for column in ("s", "MB/s", "x its bound (95 %)"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, times in self.step_ms.items():
            mean_s, ratio = summarize(times).mean / 1e3, ""
            if name in BOUNDS:
                found = self.slowdown(name)
                ratio = f"{found.ratio:.2f} ({found.ci95[0]:.2f} .. {found.ci95[1]:.2f})"
            table.add_row(name, f"{mean_s:.3f}", f"{self.nbytes / 1e6 / mean_s:.0f}", ratio)
        return table


def bench_checkpoint(case: CheckpointCase, rounds: Rounds) -> CheckpointComparison:
    """Measure saving and loading against writing and reading alone, in turns, on gloo ranks of this machine."""
    with tempfile.TemporaryDirectory(prefix="helix-bench-", dir=case.folder) as folder:
        results = launch(_rank, case, Path(folder), rounds, ranks=case.grid.ranks, timeout_s=HANG_S)
    nbytes = results[0][1]
    title = (
        f"Checkpoint of {case.shape.parameters() / 1e6:.1f} M parameters with AdamW's state, {case.grid.name}, "
        f"{case.grid.ranks} ranks"
    )
    return CheckpointComparison(title, nbytes, step_ms([spans for spans, _ in results]))


def _rank(case: CheckpointCase, folder: Path, rounds: Rounds) -> tuple[Spans, int]:
    model, optimizer = _trained(case, rounds.seed)
    first = save(folder / "first", model, [optimizer])  # whose sizes the bare files have, and which is loaded
    own = first.path / f"rank-{dist.get_rank():05d}.safetensors"
    content, bare = own.read_bytes(), folder / f"bare-{dist.get_rank()}"
    steps: dict[str, Callable[[], object]] = {
        "bare write": partial(_write, bare, content),
        "save": partial(save, folder / "saved", model, [optimizer], keep=1),
        "bare read": partial(_read, own),
        "load": partial(restore, first.path, model, [optimizer]),
    }
    held: list[tuple[float, float]] = []
    if case.background:
        steps["background save"] = partial(_in_background, BackgroundSaver(), held, folder / "later", model, optimizer)
    spans = alternate(steps, rounds)
    if held:
        spans["held by it"] = held[rounds.warmup :]
    return spans, sum(file.stat().st_size for file in first.path.glob("*.safetensors"))


def _trained(case: CheckpointCase, seed: int) -> tuple[Transformer, AdamW]:
    model = Transformer(case.shape, Mesh(case.grid), AttentionOptions())
    model.init_weights(seed)
    optimizer = AdamW(model.parameters(), foreach=False)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return model, optimizer


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _read(file: Path) -> None:
    hashlib.sha256(file.read_bytes())


def _in_background(
    saver: BackgroundSaver, held: list[tuple[float, float]], folder: Path, model: Transformer, optimizer: AdamW
) -> None:
    start = time.monotonic()
    saver.save(folder, model, [optimizer], keep=1)
    held.append((start, time.monotonic()))
    saver.wait()
