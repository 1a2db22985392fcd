"""The end of a sweep: one table of all its jobs, as files and on the terminal, and two plots of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helix.command.sweep import SweepJob, labels, others, outcome, report_of
from helix.config.methods import to_name
from helix.config.schema import InferConfig
from helix.config.words import figure, size

if TYPE_CHECKING:
    import pandas as pd

# Columns that hold text; the others hold numbers, missing where a job was not measured.
_TEXT = (
    "overrides",
    "label",
    "others",
    "status",
    "reason",
    "method",
    "model",
    "schedule",
    "folder",
    "started_at",
    "reference",
)
# Of generation: figures of the collectives, some of them summaries.
_COUNTS, _TIMES = ("per_step", "per_layer"), ("transfer_us", "wait_us", "share_of_step")
WIDE = 96  # columns of a terminal
# Summaries of the report: the mean in a column of this name, its 95 % interval in _low and _high.
_SUMMARIES = ("tokens_per_s", "step_ms", "comm_ms_per_token", "ttft_ms", "tpot_ms")


def collect(folder: Path, jobs: Sequence[SweepJob], console: Console | None = None) -> pd.DataFrame:
    """Make a sweep's table: sweep.csv, sweep.parquet and the plots in its folder, and one on the terminal.

    Args:
        folder: the sweep's.
        jobs: all of them, in the order in which they ran.

    Returns:
        the table; see `table`.
    """
    from helix.figures.ratios import ratios
    from helix.figures.style import save
    from helix.study.growth import draw_growth
    from helix.study.plots import about, draw

    frame, beside = table(jobs), comparisons(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    files = [*write_table(frame, folder / "sweep"), *draw(frame, folder), *draw_growth(jobs, folder)]
    console = console or Console()
    console.print(render(frame, console.width))
    if len(beside):
        files += [
            *write_table(beside, folder / "baselines"),
            save(ratios(beside, about(frame)), folder / "ratios.png"),
        ]
        console.print(Text(), _compared(beside), sep="\n")
    console.print(Text(f"{folder}: {', '.join(path.name for path in files)}", style="dim"), soft_wrap=True)
    return frame


def comparisons(jobs: Sequence[SweepJob]) -> pd.DataFrame:
    """A row for each job and each of its baselines, in order.

    `ratio` is how many times as fast as the baseline the job's main method is, with `_low` and `_high` for its 95 %
    interval; it is missing where the baseline did not run, and `error` has its words. The other figures are the
    baseline's own; `relative_error` is against `reference`, and `relative_error_to_h_heads` there for `perslice`.
    """
    import pandas as pd

    rows = []
    for job, label in zip(jobs, labels(jobs), strict=True):
        for each in (report_of(job.folder, job.settings) or {"baselines": []})["baselines"]:
            row = {"job": job.number, "label": label, "baseline": each["method"]["name"], "error": each.get("error")}
            if "paired" in each:
                paired, traffic = each["paired"], each["comm_bytes_per_rank_per_step"]["executed"]
                row |= {
                    "ratio": paired["ratio"],
                    "ratio_low": paired["ci95"][0],
                    "ratio_high": paired["ci95"][1],
                    "p": paired["p"],
                    "cohens_d": paired["cohens_d"],
                    "cohens_d_pooled": paired["cohens_d_pooled"],
                    "minimum_detectable_ratio": paired["minimum_detectable_ratio"],
                    "tokens_per_s": each["tokens_per_s"]["mean"],
                    "step_ms": each["step_ms"]["mean"],
                    "weights_bytes": each["memory_bytes_per_rank"]["weights"],
                    "sent_bytes": sum(traffic.values()),
                    "reference": each["accuracy"]["reference"],
                    "relative_error": each["accuracy"]["relative_error"],
                    "relative_error_to_h_heads": each["accuracy"].get("relative_error_to_h_heads"),
                    "idle_ranks": each["idle_ranks"],
                }
            rows.append(row)
    frame = pd.DataFrame(rows)
    return (
        frame
        if "ratio" in frame
        else frame.assign(ratio=float("nan"), ratio_low=float("nan"), ratio_high=float("nan"))
    )


def write_table(frame: pd.DataFrame, path: Path) -> list[Path]:
    """The table as CSV and as Parquet."""
    files = [path.with_suffix(".csv"), path.with_suffix(".parquet")]
    frame.to_csv(files[0], index=False)
    frame.to_parquet(files[1], index=False)
    return files


def _compared(beside: pd.DataFrame) -> Table:
    """Each job's name, and its baselines below."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("job, and what took turns with it", overflow="fold")
    for name in ("it is x (95 %)", "p", "its weights", "sent"):
        shown.add_column(name, justify="right", no_wrap=True)
    for (job, label), rows in beside.groupby(["job", "label"], sort=False):
        shown.add_row(Text(f"{job}  {label}", style="bold"))
        for row in rows.itertuples():
            cells = ["did not run", "", "", ""]
            if row.ratio == row.ratio:  # not NaN: it ran
                ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f}..{row.ratio_high:.2f})"
                cells = [ratio, f"{row.p:.1g}", size(int(row.weights_bytes)), size(int(row.sent_bytes))]
            shown.add_row(f"   {row.baseline}", *cells)
    return shown


def table(jobs: Sequence[SweepJob]) -> pd.DataFrame:
    """A row for each job, those that were skipped or failed included.

    Columns: `job` is Hydra's number; `status` is done, skipped, failed or open (not begun, or killed), with a
    `reason` for all but the first; `label` is a short name, and `others` the overrides that tell jobs of one method
    apart. Figures are the report's: the mean over runs, with `_low` and `_high` for its 95 % interval;
    `sent_bytes` is what leaves one rank in one step, as counted.
    """
    import pandas as pd

    rows = [
        _row(job) | {"label": label, "others": " ".join(other)}
        for job, label, other in zip(jobs, labels(jobs), others(jobs), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=list(_row_names()))
    for name in frame.columns:
        frame[name] = frame[name].astype("string") if name in _TEXT else pd.to_numeric(frame[name])
    return frame


def render(frame: pd.DataFrame, width: int = 100) -> RenderableType:
    """The table for a rich console of some width: what was measured, then what was not and why.

    The rest of the columns is in the files: memory and bytes sent too, if the console has fewer than `WIDE`.
    """
    parts: list[RenderableType] = []
    done = frame[frame["status"] == "done"]
    if len(done):
        parts.append(_measured(done, width))
    return Group(*parts, *unfinished(frame))


def unfinished(frame: pd.DataFrame) -> Iterator[RenderableType]:
    """What was not measured and why, of a table with the columns job, label, status and reason."""
    for status, said in (("skipped", "cannot run here"), ("failed", "failed"), ("open", "not measured")):
        rest = frame[frame["status"] == status]
        if len(rest):
            yield _reasons(rest, f"{len(rest)} of {len(frame)} jobs {said}")


def _row_names() -> list[str]:
    names = ["job", "label", "status", "reason", "method", "m", "n", "data", "stage", "schedule", "world_size"]
    names += ["model", "batch_size", "seq_len"]
    names += [name + end for name in _SUMMARIES for end in ("", "_low", "_high")]
    names += [f"collectives_{name}" for name in (*_COUNTS, *_TIMES)]
    names += ["weights_bytes", "kv_cache_bytes", "peak_bytes", "sent_bytes"]
    names += ["reference", "relative_error", "relative_error_to_h_heads", "tokens_equal"]
    return [*names, "overrides", "others", "started_at", "folder"]


def _row(job: SweepJob) -> dict[str, Any]:
    settings, became = job.settings, outcome(job)
    assert isinstance(settings, InferConfig)
    parallel, work = settings.parallel, settings.workload
    row: dict[str, Any] = {
        "job": job.number,
        "status": became.status,
        "reason": became.reason,
        "method": to_name(parallel),
        "m": parallel.m,
        "n": parallel.n,
        "data": parallel.data,
        "stage": parallel.stage,
        "world_size": parallel.ranks,
        "model": settings.model.name,
        "batch_size": work.batch_size,
        "seq_len": work.seq_len,
        "overrides": " ".join(job.overrides),
        "folder": job.folder.name,
    }
    report = report_of(job.folder, settings)
    return row if report is None else row | _measures(report)


def _measures(report: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in _SUMMARIES:
        if report.get(name) is None:  # not generated, or ranks of several hosts, without a common clock
            continue
        low, high = report[name]["ci95"]
        row |= {name: report[name]["mean"], f"{name}_low": low, f"{name}_high": high}
    memory, traffic = report["memory_bytes_per_rank"], report["comm_bytes_per_rank_per_step"]
    if about := report.get("generation"):
        row |= {"batch_size": min(len(about["prompts"]), report["workload"]["batch_size"])}
        row |= {"seq_len": max(about["prompt_tokens"])}
    if each := report.get("collectives"):
        row |= {f"collectives_{name}": each[name] for name in _COUNTS}
        row |= {f"collectives_{name}": each[name]["mean"] for name in _TIMES}
    schedules = (report["method"].get("schedule") or {}).values()  # rivals have none
    return row | {
        "method": report["method"]["name"],
        "schedule": "/".join(name for name in schedules if name) or None,
        "world_size": report["world_size"],
        "weights_bytes": memory["weights"],
        "kv_cache_bytes": memory["kv_cache"],
        "peak_bytes": memory["peak"],
        "sent_bytes": sum(traffic["executed"].values()),
        "reference": report["accuracy"]["reference"],
        "relative_error": report["accuracy"]["relative_error"],
        "relative_error_to_h_heads": report["accuracy"].get("relative_error_to_h_heads"),
        "tokens_equal": report["accuracy"].get("tokens_equal"),
        "started_at": report["started_at"],
    }


def _measured(done: pd.DataFrame, width: int) -> Table:
    generated = bool(done["ttft_ms"].notna().any())
    if generated:
        names = ["ranks", "TTFT ms", "TPOT ms", "± 95 %", "tokens"]
    else:
        names = ["ranks", "tokens/s", "± 95 %", "step ms", "comm us/token", "error"]
    if width >= WIDE:
        names[-1:-1] = ["tokens/s", "weights", "sent"] if generated else ["weights", "sent"]
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("job", justify="right", no_wrap=True)
    shown.add_column("method", overflow="fold", min_width=12)  # the only one that gives way
    shown.add_column("schedule", no_wrap=True)
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    spread = "tpot_ms" if generated else "tokens_per_s"
    for row in done.to_dict("records"):
        cells = {
            "ranks": str(row["world_size"]),
            "tokens/s": figure(row["tokens_per_s"]),
            "± 95 %": figure((row[f"{spread}_high"] - row[f"{spread}_low"]) / 2),
            "step ms": figure(row["step_ms"]),
            "TTFT ms": figure(row["ttft_ms"]),
            "TPOT ms": figure(row["tpot_ms"]),
            "comm us/token": f"{row['comm_ms_per_token'] * 1e3:.3g}",  # nan where it is not known
            "weights": size(int(row["weights_bytes"])),
            "sent": size(int(row["sent_bytes"])),
            "error": f"{row['relative_error']:.1e}",
            "tokens": {1: "equal", 0: "differ"}.get(row["tokens_equal"], "-"),
        }
        schedule = row["schedule"] if isinstance(row["schedule"], str) else "-"
        shown.add_row(str(row["job"]), str(row["label"]), schedule, *(cells[name] for name in names))
    return shown


def _reasons(rest: pd.DataFrame, title: str) -> RenderableType:
    lines = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    lines.add_column(justify="right", no_wrap=True)
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for row in rest.fillna({"reason": ""}).itertuples():
        lines.add_row(str(row.job), str(row.label), str(row.reason), style="dim")
    return Group(Text(), Text(title + ":"), lines)
