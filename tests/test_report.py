"""The report's contract, and the table made of it."""

from __future__ import annotations

import io
import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from helix.config.words import figure, size
from helix.study import provenance
from helix.study.report import (
    Accuracy,
    Bubble,
    Measurement,
    Memory,
    MethodLabel,
    Refusal,
    Report,
    Rival,
    Schedules,
    Tracked,
    Traffic,
    to_json,
    write,
)
from helix.study.statistics import paired, summarize
from helix.study.table import render

QKV, OUT, EXPERTS = "all_to_all/attention.qkv", "reduce_scatter/attention.output", "all_to_all/moe.dispatch"


def made_up() -> Report:
    """A report with invented figures, of the width that real ones have."""
    return Report(
        started_at="2026-08-01T12:00:00+00:00",
        method=MethodLabel("helix_4x4", 4, 4, Schedules("heads")),
        world_size=16,
        model={"name": "moe", "heads": 16, "head_dim": 64},
        hardware={"name": "cpu"},
        workload={"name": "small", "batch_size": 8, "seq_len": 256, "iterations": 10},
        precision="32-true",
        seed=0,
        tokens_per_s=summarize([1_580_000.0, 1_610_000.0, 1_595_000.0]),
        step_ms=summarize([850.1, 861.2, 855.3]),
        comm_ms_per_token=summarize([0.0912, 0.0954, 0.0931]),
        memory_bytes_per_rank=Memory(
            weights=4_330_752, activations_peak=52_428_800, peak=891_289_600, predicted=4_330_752
        ),
        comm_bytes_per_rank_per_step=Traffic(
            {QKV: 4_718_592, OUT: 1_572_864, EXPERTS: 1_234_567_890},
            {QKV: 4_718_592, OUT: 1_572_864, EXPERTS: 1_234_567_890},
        ),
        accuracy=Accuracy("mha_fp32_single", 3.1e-7),
        wandb=Tracked("offline", "wandb/offline-run-20260801_120000-abcdefgh", "abcdefgh"),
    )


def rendered(report: Report, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(report))
    return console.export_text()


def perslice() -> Report:
    report = made_up()
    return replace(
        report,
        method=replace(report.method, schedule=Schedules("perslice")),
        accuracy=Accuracy("mha_narrow_heads", 2.9e-7, relative_error_to_h_heads=0.83),
    )


def test_json_has_the_contracts_keys() -> None:
    content = json.loads(to_json(made_up()))
    assert content["method"] == {
        "name": "helix_4x4",
        "m": 4,
        "n": 4,
        "schedule": {"prefill": "heads", "decode": None},
        "data": 1,
        "stage": 1,
    }
    contract = {"world_size", "model", "hardware", "workload", "versions", "command", "git_commit", "started_at"}
    contract |= {"tokens_per_s", "comm_ms_per_token", "step_ms", "ttft_ms", "tpot_ms", "memory_bytes_per_rank"}
    contract |= {"comm_bytes_per_rank_per_step", "accuracy", "baselines", "wandb"}
    assert contract <= content.keys()
    assert content["tokens_per_s"].keys() == {"runs", "mean", "sd", "ci95", "cv", "bootstrap95"}
    assert len(content["tokens_per_s"]["ci95"]) == 2
    assert content["memory_bytes_per_rank"].keys() == {"weights", "kv_cache", "activations_peak", "peak", "predicted"}
    assert content["comm_bytes_per_rank_per_step"].keys() == {"executed", "predicted"}
    assert content["accuracy"] == {"reference": "mha_fp32_single", "relative_error": 3.1e-7}
    assert content["wandb"].keys() == {"mode", "path", "id"}
    assert content["baselines"] == []


def test_perslice_reports_both_errors() -> None:
    assert json.loads(to_json(perslice()))["accuracy"] == {
        "reference": "mha_narrow_heads",
        "relative_error": 2.9e-7,
        "relative_error_to_h_heads": 0.83,
    }


def test_what_is_not_finite_becomes_null_and_counters_become_objects() -> None:
    counted: dict[str, int] = defaultdict(int)
    counted[QKV] += 8
    report = replace(
        made_up(),
        accuracy=Accuracy("mha_fp32_single", math.nan),
        hardware={"link_GB_per_s": math.inf},
        comm_bytes_per_rank_per_step=Traffic(counted, {QKV: 8}),
    )
    content = json.loads(to_json(report))
    assert content["accuracy"]["relative_error"] is None
    assert content["hardware"] == {"link_GB_per_s": None}
    assert content["comm_bytes_per_rank_per_step"]["executed"] == {QKV: 8}
    assert report.comm_bytes_per_rank_per_step.agrees


def test_write_replaces_the_file_and_leaves_no_draft(tmp_path: Path) -> None:
    target = tmp_path / "run" / "report.json"
    write(made_up(), target)
    write(perslice(), target)
    assert json.loads(target.read_text())["method"]["schedule"]["prefill"] == "perslice"
    assert [file.name for file in target.parent.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    target = write(made_up(), tmp_path / "report.json")
    before = target.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(replace(made_up(), model={"name": object()}), target)
    assert target.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_provenance() -> None:
    found = provenance.versions()
    assert {"python", "torch", "wandb"} <= found.keys()
    assert provenance.command().startswith("python ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", provenance.now())
    commit = provenance.git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("report", [made_up(), perslice()], ids=["exact", "perslice"])
def test_table_fits_and_breaks_no_figure(report: Report, width: int) -> None:
    lines = rendered(report, width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for part in (
        "helix_4x4",
        "1,595,000",
        "1,557,738 .. 1,632,262",
        "communication, ms/token",
        "1,234,567,890",
        "4.33 MB",
    ):
        assert part in text
    assert text.count("✓") == 4  # three collectives and their sum
    assert "✗" not in text
    assert report.wandb is not None
    assert f"{report.wandb.path}\n" in text + "\n"  # one line, to be copied


def test_table_warns_of_perslice_alone() -> None:
    assert "A different function" in rendered(perslice(), 80)
    assert "83%" in rendered(perslice(), 80)
    assert "A different function" not in rendered(made_up(), 80)


def test_table_marks_bytes_that_differ() -> None:
    traffic = Traffic({QKV: 100, OUT: 5}, {QKV: 101})
    text = rendered(replace(made_up(), comm_bytes_per_rank_per_step=traffic), 80)
    assert text.count("✗ differ") == 3  # both collectives, the unforeseen one too, and the sum


def test_table_of_one_process() -> None:
    report = replace(
        made_up(),
        method=MethodLabel("single", 1, 1, Schedules("heads")),
        world_size=1,
        comm_ms_per_token=summarize([0.0, 0.0]),
        comm_bytes_per_rank_per_step=Traffic({}, {}),
        wandb=None,
    )
    text = rendered(report, 80)
    assert "1 rank\n" in text.replace(" \n", "\n")
    assert "Nothing moves" in text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0932123, "0.09321"), (855.54, "855.5"), (999.96, "1,000"), (1.5e6, "1,500,000")]
)
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (4_330_752, "4.33 MB")])
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def compared() -> Report:
    """A report with baselines: one that ran, one with a model of its own, and one that did not run."""
    report = made_up()
    own = {name: getattr(report, name) for name in Measurement.__dataclass_fields__}
    slower = summarize([1_700.2, 1_650.4, 1_720.9])
    beside = paired(slower.runs, report.step_ms.runs)
    tp8_pp2 = replace(
        Rival(**own, paired=beside),
        method=MethodLabel("tp8_pp2", 1, 8, Schedules(None), stage=2),
        bubble=Bubble(0.183, 0.2),
        idle_ranks=3,
    )
    traffic = Traffic({"all_gather/tensor": 1_000_000}, None)
    other = replace(
        Rival(**own, paired=beside),
        method=MethodLabel("hf_tp16", 1, 16, Schedules(None)),
        accuracy=Accuracy("own_model_single", 1e-7),
        comm_bytes_per_rank_per_step=traffic,
    )
    refused = Refusal(MethodLabel("cp16", 1, 16, Schedules(None)), "NotImplementedError: no sharding strategy")
    return replace(report, baselines=[tp8_pp2, other, refused])


def test_baselines_have_the_reports_keys_and_the_comparison() -> None:
    content = json.loads(to_json(compared()))
    first, second, third = content["baselines"]
    assert first.keys() == {*Measurement.__dataclass_fields__, "paired"} - {"between_hosts"}
    assert first["paired"].keys() >= {"ratio", "ci95", "t", "p", "cohens_d"}
    assert first["bubble"] == {"measured": 0.183, "predicted": 0.2}
    assert "relative_error_to_h_heads" not in first["accuracy"]
    assert second["comm_bytes_per_rank_per_step"]["predicted"] is None
    assert third == {
        "method": {
            "name": "cp16",
            "m": 1,
            "n": 16,
            "schedule": {"prefill": None, "decode": None},
            "data": 1,
            "stage": 1,
        },
        "error": "NotImplementedError: no sharding strategy",
    }


def test_the_table_compares_baselines_within_80_columns() -> None:
    text = rendered(compared(), 80)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("tp8_pp2"))
    assert re.search(r"1\.9\d \(1\.\d\d\.\.2\.\d\d\)", row)
    assert row.rstrip().endswith("3e-07")
    said = " ".join(text.split())
    assert "tp8_pp2 leaves 3 of 16 ranks idle" in said
    assert "pipeline bubble 20% by its form, measured 18%" in said
    assert "cp16 did not run: NotImplementedError: no sharding strategy" in said
    assert "hf_tp16 runs a model of its own" in said
