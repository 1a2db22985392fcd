"""`infer.py` end to end, as a user runs it: small, on few ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Command
from readme import script
from wandb_runs import wandb_records

TINY = [
    "model.layers=2",
    "model.width=64",
    "model.heads=4",
    "model.head_dim=16",
    "model.mlp_hidden=64",
    "workload.batch_size=4",
    "workload.seq_len=32",
    "workload.iterations=2",
    "workload.runs=5",
]


def _start(run_dir: Path, *overrides: str) -> Command:
    return Command("infer.py", f"hydra.run.dir={run_dir}", *overrides)


def _run(run_dir: Path, *overrides: str, timeout_s: float = 90) -> tuple[dict[str, Any], str]:
    process = _start(run_dir, *overrides)
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err
    return json.loads((run_dir / "report.json").read_text()), out


def test_moe_on_four_ranks_reports_what_the_contract_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "outputs" / "moe"
    report, out = _run(run_dir, "parallel=helix", "parallel.m=2", "parallel.n=2", "model=moe", *TINY)
    assert report["world_size"] == 4
    assert report["method"]["name"] == "helix_2x2"
    assert report["method"]["schedule"]["prefill"] in ("heads", "batch", "rows", "gather", "score")
    assert report["accuracy"]["reference"] == "mha_fp32_single"
    assert report["accuracy"]["relative_error"] <= 1e-5
    traffic = report["comm_bytes_per_rank_per_step"]
    assert traffic["executed"] == traffic["predicted"]
    assert "all_to_all/experts" in traffic["executed"]
    for key in ("tokens_per_s", "step_ms", "comm_ms_per_token"):
        assert len(report[key]["runs"]) == 5
        assert report[key]["ci95"][0] < report[key]["mean"] < report[key]["ci95"][1]
    memory = report["memory_bytes_per_rank"]
    assert memory["weights"] == memory["predicted"]
    assert memory["peak"] == memory["weights"] + memory["activations_peak"]
    assert "helix_2x2" in out
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(script("load_runs"), "runs.md", "exec"), names)  # what docs/runs.md says of runs holds for this one
    assert capsys.readouterr().out.split()[-4:-1] == ["0", "finished", "helix_2x2"]
    assert len(names["runs"].history[0]) == 5 * 2


def test_baselines_take_turns_and_the_report_compares_them(tmp_path: Path) -> None:
    """Those that run have the main method's keys and a paired comparison; one that cannot has its own words."""
    report, out = _run(
        tmp_path, "parallel=helix", "parallel.m=2", "parallel.n=2", "model=moe", *TINY, "workload.runs=3",
        "baseline=[tp2_pp2,tp4,dp4,single,helix_4x1_perslice,cp4,helix_1x4]", "model.kv_heads=2", "profile=true",
    )  # fmt: skip
    by_name = {each["method"]["name"]: each for each in report["baselines"]}
    assert list(by_name) == ["tp2_pp2", "tp4", "dp4", "single", "helix_4x1_perslice", "cp4", "helix_1x4"]
    for name in ("tp2_pp2", "dp4", "single", "helix_4x1_perslice"):
        each = by_name[name]
        assert each["accuracy"]["relative_error"] <= 1e-5
        assert len(each["step_ms"]["runs"]) == 3
        paired = each["paired"]
        assert paired["pairs"] == 3
        assert paired["ci95"][0] <= paired["ratio"] <= paired["ci95"][1]
        assert paired.keys() >= {"t", "p", "cohens_d", "cohens_d_pooled", "minimum_detectable_ratio", "bootstrap95"}
        traffic = each["comm_bytes_per_rank_per_step"]
        assert traffic["executed"] == traffic["predicted"]
    assert by_name["helix_4x1_perslice"]["accuracy"]["reference"] == "mha_narrow_heads"
    assert by_name["tp2_pp2"]["bubble"]["predicted"] == 0.2
    assert by_name["single"]["idle_ranks"] == 3
    assert "kv_heads is 2" in by_name["tp4"]["error"]
    assert "n=4 does not divide kv_heads=2" in by_name["helix_1x4"]["error"]
    parts = [report[f"{part}_ms_per_token"]["mean"] for part in ("comm", "wait", "compute")]
    assert min(parts) > 0
    assert "tp4 did not run" in " ".join(out.split())
    traces = sorted(path.relative_to(tmp_path / "traces").as_posix() for path in tmp_path.glob("traces/*/*"))
    assert [f"helix_2x2/trace_rank{rank}.json.gz" for rank in range(4)] == [
        path for path in traces if path.startswith("helix_2x2/trace_rank")
    ]


def test_odd_shapes(tmp_path: Path) -> None:
    """9 heads, 3 KV heads, width 96, length 100, batch 1, on 3 x 1 ranks."""
    report, _ = _run(
        tmp_path, "parallel=helix", "parallel.m=1", "parallel.n=3", "model=dense", "model.layers=1", "model.width=96",
        "model.heads=9", "model.kv_heads=3", "model.head_dim=32", "model.mlp_hidden=100", "model.vocab=257",
        "workload.batch_size=1", "workload.seq_len=100", "workload.iterations=1", "workload.runs=2", "logger=none",
    )  # fmt: skip
    assert report["accuracy"]["relative_error"] <= 1e-5
    assert report["comm_bytes_per_rank_per_step"]["executed"] == report["comm_bytes_per_rank_per_step"]["predicted"]


def test_data_replicas_and_single(tmp_path: Path) -> None:
    for name, overrides in (
        ("data", ["parallel=helix", "parallel.m=1", "parallel.n=2", "parallel.data=2", "model=moe"]),
        ("single", ["parallel=single", "model=dense"]),
    ):
        report, _ = _run(tmp_path / name, *overrides, "logger=none", *TINY, "workload.runs=2")
        traffic = report["comm_bytes_per_rank_per_step"]
        assert report["accuracy"]["relative_error"] <= 1e-5
        assert traffic["executed"] == traffic["predicted"]
        assert bool(traffic["executed"]) == (name == "data")


def test_multirun_runs_every_job_and_perslice_says_that_it_is_another_function(tmp_path: Path) -> None:
    words = ["parallel=helix", "parallel.m=2", "parallel.n=1,2", "parallel.schedule=perslice", "model=dense"]
    process = Command("infer.py", "-m", f"hydra.sweep.dir={tmp_path}", *words, "logger=none", *TINY, "workload.runs=2")
    assert process.wait(timeout=90) == 0, process.read()
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/report.json"))]
    assert [report["method"]["name"] for report in reports] == ["helix_2x1_perslice", "helix_2x2_perslice"]
    for report in reports:
        assert report["accuracy"]["reference"] == "mha_narrow_heads"
        assert report["accuracy"]["relative_error"] <= 1e-5
        assert report["accuracy"]["relative_error_to_h_heads"] > 0.01
        assert report["wandb"] is None
    assert " ".join(process.read()[0].split()).count("different function") == 2


def test_a_killed_rank_ends_the_command_and_keeps_what_was_logged(tmp_path: Path) -> None:
    endless = [*TINY, "workload.iterations=100000", "workload.runs=2"]
    process = _start(tmp_path, "parallel=helix", "parallel.m=1", "parallel.n=4", "model=dense", *endless)
    ranks = _ranks(process)
    _wait_for(lambda: list((tmp_path / "wandb").glob("offline-run-*")), "W&B run")
    time.sleep(6)  # well into the steps
    os.kill(ranks[2], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - killed < 10
    assert process.returncode == 1
    assert re.fullmatch(r".*rank 2 \(host .*\) was killed by SIGKILL during measurement, run 1 of 2; .*\n", err)
    assert json.loads((tmp_path / "failed.json").read_text())["phase"] == "measurement, run 1 of 2"
    kept = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert kept[0]["run"] == 0
    assert all(each["rank0_step_ms"] > 0 for each in kept)
    assert not [pid for pid in ranks if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert not (tmp_path / "report.json").exists()
    records = wandb_records(next((tmp_path / "wandb").glob("offline-run-*")))
    assert [record for record in records if record["type"] == "history"]
    assert records[-1]["exit"]["exit_code"] != 0


def _ranks(process: Command) -> list[int]:
    """The pids of the four ranks, in order of rank: they are forked one after the other."""

    def children() -> list[int]:
        return sorted(child.pid for child in psutil.Process(process.pid).children())

    _wait_for(lambda: children()[3:], "ranks")
    return children()[-4:]


def _wait_for(found: Callable[[], list[Any]], what: str) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.2)
