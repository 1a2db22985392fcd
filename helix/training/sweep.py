"""The end of a sweep of trainings: a row for each job, one for each setting over its seeds, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helix.command.sweep import SweepJob, labels, outcome, report_of
from helix.config.methods import to_name
from helix.config.train_schema import TrainConfig
from helix.config.words import figure
from helix.study.sweep import unfinished, write_table
from helix.training.compare import Estimate, Setting, difference, final_bpb, loss_gaps, settings_of

if TYPE_CHECKING:
    import pandas as pd

_NOTE = (
    "bits/byte: of the validation after the last step. loss gap: the largest distance of two training losses at one "
    "step, a token."
)


def collect(folder: Path, jobs: Sequence[SweepJob], console: Console | None = None) -> None:
    """Make a sweep's tables and its picture: sweep.csv, settings.csv, losses.csv (also as Parquet) and curves.png.

    Args:
        folder: the sweep's.
        jobs: all of them, in the order in which they ran.
    """
    from helix.figures.style import save
    from helix.training.plots import draw_settings, losses

    folder.mkdir(parents=True, exist_ok=True)
    frame, settings = table(jobs), settings_of(jobs)
    files = [*write_table(frame, folder / "sweep"), *write_table(by_setting(settings), folder / "settings")]
    console = console or Console()
    if any(setting.reports for setting in settings):
        files += write_table(losses(settings), folder / "losses")
        files.append(save(draw_settings(settings), folder / "curves.png"))
        console.print(_reached(settings))
        if any(setting.pairs for setting in settings):
            console.print(Text(), _against(settings), sep="\n")
        console.print(Text(_NOTE, style="dim"))
    console.print(*unfinished(frame), sep="\n", end="")
    console.print(Text(f"{folder}: {', '.join(path.name for path in files)}", style="dim"), soft_wrap=True)


def table(jobs: Sequence[SweepJob]) -> pd.DataFrame:
    """A row for each job, those that were skipped or failed included; figures are missing where it did not end.

    Columns as in `helix.study.sweep.table`; `loss_scale` is the last one, of 16-mixed.
    """
    import pandas as pd

    rows = []
    for job, label in zip(jobs, labels(jobs), strict=True):
        one, became = job.settings, outcome(job)
        assert isinstance(one, TrainConfig)
        row: dict[str, Any] = {"job": job.number, "label": label, "status": became.status, "reason": became.reason}
        row |= {"method": to_name(one.parallel), "world_size": one.parallel.ranks, "model": one.model.name}
        row |= {"precision": one.precision, "seed": one.seed, **_measures(report_of(job.folder, one))}
        rows.append(row | {"overrides": " ".join(job.overrides), "folder": job.folder.name})
    return pd.DataFrame(rows)


def _measures(report: dict[str, Any] | None) -> dict[str, Any]:
    names = ("steps", "validation_bpb", "tokens_per_s", "wall_s", "started_at")
    if report is None:
        return dict.fromkeys(("schedule", *names, "skipped_steps", "loss_scale"))
    scales = report["loss_scales"]
    measures = {"schedule": report["method"]["schedule"]["prefill"], **{name: report[name] for name in names}}
    return measures | {"skipped_steps": len(report["skipped_steps"]), "loss_scale": scales[-1] if scales else None}


def by_setting(settings: Sequence[Setting]) -> pd.DataFrame:
    """A row for each setting, over its seeds.

    `validation_bpb` is the mean after the last step, with `_low` and `_high` for its 95 % t-interval; `difference`
    the same of what it is above the reference's, over the `pairs` of one seed; `loss_gap` the largest distance of
    the training losses of such a pair at any step, in nats a token.
    """
    import pandas as pd

    return pd.DataFrame([_row(setting) for setting in settings])


def _row(setting: Setting) -> dict[str, Any]:
    reached, above, gaps = final_bpb(setting), difference(setting), loss_gaps(setting)
    row: dict[str, Any] = {"setting": setting.label, "runs": reached.runs}
    row |= {"validation_bpb": reached.mean, "validation_bpb_low": reached.low, "validation_bpb_high": reached.high}
    row |= {"reference": setting.reference.label if setting.reference else None, "pairs": above.runs}
    row |= {"difference": above.mean, "difference_low": above.low, "difference_high": above.high}
    return row | {"loss_gap": math.nan if gaps is None else float(gaps.max())}


def _reached(settings: Sequence[Setting]) -> Table:
    """What each setting came to; with 16-mixed also what became of the loss scale."""
    reports = [report for setting in settings for report in setting.reports.values()]
    scaled = any(report["loss_scales"] and report["loss_scales"][-1] for report in reports)
    columns = ["seeds", "bits/byte", "95 % interval", "tokens/s", *(["skipped", "scale"] if scaled else [])]
    shown = _table("setting", *columns)
    for setting in (setting for setting in settings if setting.reports):
        reached, own = final_bpb(setting), list(setting.reports.values())
        # None of a job that went on from a training that was done.
        speeds = [report["tokens_per_s"] for report in own if report["tokens_per_s"] is not None]
        speed = figure(sum(speeds) / len(speeds)) if speeds else "-"
        cells = [str(reached.runs), f"{reached.mean:.4f}", _interval(reached, ".4f"), speed]
        if scaled:
            cells.append(" ".join(str(len(report["skipped_steps"])) for report in own))
            cells.append(" ".join(_scale(report["loss_scales"][-1]) for report in own))
        shown.add_row(setting.label, *cells)
    return shown


def _against(settings: Sequence[Setting]) -> Table:
    """Each setting below the one that it is held against."""
    shown = _table("over pairs of a seed", "pairs", "bits/byte", "95 % interval", "loss gap, nats")
    for reference in settings:
        held = [setting for setting in settings if setting.reference is reference and setting.pairs]
        if held:
            shown.add_row(Text(f"against {reference.label}", style="bold"))
        for setting in held:
            above, gaps = difference(setting), loss_gaps(setting)
            assert gaps is not None
            cells = (str(above.runs), f"{above.mean:+.4f}", _interval(above, "+.4f"), f"{gaps.max():.1e}")
            shown.add_row(f"   {setting.label}", *cells)
    return shown


def _table(first: str, *columns: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column(first, overflow="fold", min_width=12)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    return shown


def _interval(of: Estimate, form: str) -> str:
    return "-" if math.isnan(of.low) else f"{of.low:{form}}..{of.high:{form}}"


def _scale(value: float | None) -> str:
    """A power of two."""
    return "-" if value is None else f"2^{math.log2(value):.0f}"
