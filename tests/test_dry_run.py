"""A dry run of Helix's own transformer against what launched ranks do, and against the closed forms."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks

from helix.comm.record import record
from helix.config.dry_run import check_dry_run
from helix.config.hardware import HardwareConfig
from helix.config.methods import from_name
from helix.config.parallel import ParallelConfig
from helix.config.schema import (
    ConfigError,
    InferConfig,
    LoggerConfig,
    ModelConfig,
    WorkloadConfig,
    to_shape,
)
from helix.dryrun import drawn, timeline
from helix.dryrun.figures import Traced
from helix.dryrun.live import Live
from helix.dryrun.run import run
from helix.dryrun.tracer import Trace, Tracer
from helix.dryrun.world import DEVICE, pretended
from helix.generation.errors import CannotRun
from helix.parallel.methods.build import build
from helix.parallel.methods.configured import resolve
from helix.parallel.methods.method import Job
from helix.partition.schedules import SCHEDULES
from helix.planner.band import band
from helix.planner.catalogue import hardware
from helix.planner.machine import machine_of
from helix.study.profile import profiled

ROOT = Path(__file__).resolve().parents[1]
# One layer of experts, so that one number says how full the fullest was.
EXPERTS: dict[str, Any] = {"kind": "moe", "layers": 1, "experts": 4, "kv_heads": 4}
# Four ranks, and what is special about each: grouped heads with norms, odd numbers of rows, experts, others' code.
CASES: dict[str, dict[str, Any]] = {
    "helix_2x2": {"qk_norm": True},
    "helix_4x1_rows": {},
    "helix_2x2_gather": EXPERTS,
    "tp4": {"kv_heads": 4},
    "tp4_sp": {"kv_heads": 4},
    "dp4": EXPERTS,
}


def settings(name: str, **model: Any) -> InferConfig:
    dims: dict[str, Any] = {"layers": 2, "width": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_hidden": 80}
    return InferConfig(
        parallel=from_name(name),
        model=ModelConfig(**({"name": "tiny"} | dims | model)),
        hardware=HardwareConfig(name="auto", source="this machine"),
        workload=WorkloadConfig("small", batch_size=4, seq_len=12, warmup=0, iterations=1, runs=2),
        logger=LoggerConfig(kind="none"),
    )


def traced(one: InferConfig) -> tuple[Traced, Trace]:
    with pretended(one.parallel.ranks):
        return drawn.trace_step(one, one.parallel, None)


def execute(cases: dict[str, dict[str, Any]], folder: Path) -> list[tuple[dict[str, int], dict[str, int]]]:
    """What this rank moved in a step of each case; the first one is profiled too."""
    found = []
    for number, (name, model) in enumerate(cases.items()):
        one = settings(name, **model)
        work, shape = one.workload, to_shape(one.model)
        job = Job(shape, work.batch_size, work.seq_len, torch.float32, torch.device("cpu"), seed=0)
        method = build(one.parallel.method, job, resolve(one, one.parallel))
        tokens = torch.randint(256, (job.batch, job.length), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            with record() as log, method.observed():
                method.step(tokens)
            if number == 0:
                profiled(partial(method.step, tokens), folder, job.device)
        found.append((dict(+Counter(log.bytes)), dict(log.calls)))
    return found


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def executed(deepspeed: None, profile: Path) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """Of rank 0."""
    return dict(zip(CASES, on_ranks(4, execute, CASES, profile, timeout_s=60)[0], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_trace_moves_what_ranks_move(name: str, executed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, calls = executed[name]
    one = settings(name, **CASES[name])
    if "all_to_all/experts" in moved:
        # Which tokens the random router prefers is the one thing that a trace cannot know: 2 exchanges with 3 others.
        rows = moved["all_to_all/experts"] // (2 * 3 * one.model.width * 4)
        monkeypatch.setattr(drawn, "expected_fullest", lambda *_: rows)
    found, trace = traced(one)
    assert dict(+Counter(trace.bytes)) == moved
    assert trace.calls == calls
    assert all(each.bytes.agrees for each in found.passes[0].collectives.values())
    assert found.weights.agrees


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("causal", [True, False])
def test_flops_and_weights_are_those_of_the_closed_forms(schedule: str, causal: bool) -> None:
    found, trace = traced(settings(f"helix_2x2_{schedule}", causal=causal, kv_heads=4))
    one = found.passes[0]
    assert one.flops.traced == trace.flops > 0
    assert one.flops.agrees
    assert found.weights.agrees
    assert 0 <= one.buffers <= one.activations.traced


@pytest.mark.parametrize("name", ["helix_1x4", "helix_4x1", "tp4"])
def test_rank_0_is_as_full_as_any(name: str) -> None:
    """Where ranks do not divide the vocabulary or the MLP, the last ones have less."""
    hidden = 81 if name.startswith("helix") else 80  # PyTorch's own tensor parallelism divides it, or fails
    found, _ = traced(settings(name, kv_heads=4, vocab=259, mlp_hidden=hidden))
    assert found.fullest == (0, found.weights.traced)


def test_another_rank_that_sends_more_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of six samples the second of four ranks is dealt two, whose outputs it sends back."""
    one = settings("helix_4x1_batch")
    one.workload.batch_size = 6
    found, trace = traced(one)
    assert found.busiest is not None
    rank, sent = found.busiest
    assert rank == 1
    assert sent > sum(trace.bytes.values())
    run(one, tmp_path)
    assert "Rank 1 sends most in a step" in capsys.readouterr().out


def test_routing_is_as_even_as_chance_makes_it() -> None:
    found, trace = traced(settings("single", **EXPERTS))
    assert [note for note in found.notes if "12 of them" in note]  # of 48 tokens and 4 experts
    assert trace.flops == pytest.approx(found.passes[0].flops.predicted, rel=0.02)  # but for the router
    padded, _ = traced(settings("helix_2x2", **EXPERTS))
    assert padded.passes[0].flops.traced > padded.passes[0].flops.predicted


def test_memory_is_what_is_alive_together() -> None:
    tracer, model = Tracer(), torch.nn.Linear(10, 100, bias=False, device=DEVICE)
    with tracer, torch.no_grad():
        x = torch.zeros(5, 10, device=DEVICE)
        with tracer.passing(model) as trace:
            y = model(x)  # 2000 B
            y = y + 1  # another 2000 B
            z = y.view(100, 5)[:, :2]
            y = z.clone()  # 800 B, while those before are still there
    assert trace.held == 200
    assert trace.peak == 4000
    assert tracer.live.total == 200 + 2000 + 800  # z holds all that it is a view of
    del y, z
    assert tracer.live.total == 200
    assert [each.flops for each in trace.operators if each.flops] == [2 * 5 * 10 * 100]


def test_a_storage_counts_once() -> None:
    live, x = Live(), torch.zeros(10, device=DEVICE)
    for each in (x, x.view(2, 5), x[3:]):
        live.see(each, "activations")
    assert live.total == 40
    del x, each
    assert live.total == 0


def test_the_timeline_has_the_names_of_a_measured_one(executed: Any, profile: Path, tmp_path: Path) -> None:
    one = settings("helix_2x2", **CASES["helix_2x2"])
    machine = machine_of(hardware("dgx_h100"), one.precision, one.parallel.ranks)
    path = timeline.write([(drawn.STEP, traced(one)[1])], machine, tmp_path / "traces")
    predicted, measured = events(path), events(profile / "trace_rank0.json.gz")
    assert named(predicted, "user_annotation") == {
        name for name in named(measured, "user_annotation") if not name.startswith("gloo:")
    }
    assert named(predicted, "cpu_op") <= named(measured, "cpu_op")
    assert {event["pid"] for event in predicted}.isdisjoint(event["pid"] for event in measured)
    rows = {event["args"]["name"]: event["tid"] for event in predicted if event["name"] == "thread_name"}
    spans = [event for event in predicted if event["ph"] == "X"]
    assert len(spans) + sum(event["ph"] == "M" for event in predicted) == len(predicted)
    for event in spans:
        assert (event["tid"] == rows["exchange"]) == ("/" in event["name"])
        assert event["dur"] >= 0
    (step,) = (event for event in spans if event["name"] == "step")
    leaves = [event for event in spans if "args" in event]
    assert step["dur"] == pytest.approx(sum(event["dur"] for event in leaves))


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def named(found: list[dict[str, Any]], category: str) -> set[str]:
    return {event["name"] for event in found if event.get("cat") == category}


def test_a_thousand_ranks_need_no_more_than_a_laptop_has(tmp_path: Path) -> None:
    """In an interpreter of its own, imports included; processor time, as others use this machine too."""
    words = "dry_run=true parallel=helix_64x16 model=paper_dense_16l hardware=dgx_h100 workload=paper"
    command = [sys.executable, str(ROOT / "infer.py"), *words.split(), f"hydra.run.dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_utime + usage.ru_stime < 10
    assert usage.ru_maxrss * 1024 < 2e9
    report = json.loads((tmp_path / "dry_run.json").read_text())
    (step,) = report["main"]["passes"]
    assert report["main"]["ranks"] == 1024
    assert step["flops"]["traced"] == step["flops"]["predicted"] == 9_702_113_280_000
    assert all(each["bytes"]["traced"] == each["bytes"]["predicted"] for each in step["collectives"].values())
    assert step["seconds"]["attention"]["exchange"] > 0
    assert "helix_64x16" in out
    assert "their error is unknown" in " ".join(out.split())
    assert events(tmp_path / "traces" / "helix_64x16" / timeline.NAME)


def test_without_figures_of_a_machine_there_are_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = settings("helix_2x2")
    one.baseline = ["tp2_dp2", "dp4", "single", "helix_1x4"]
    run(one, tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "No times: hardware=auto says nothing of a machine; take hardware=cpu, dgx_a100" in out
    assert "cannot run" in out  # two KV heads on four ranks
    report = json.loads((tmp_path / "dry_run.json").read_text())
    assert [each["method"]["name"] for each in report["baselines"]] == one.baseline
    assert report["main"]["passes"][0]["seconds"] is None
    assert not (tmp_path / "traces").exists()


def test_a_method_that_fails_says_so_itself(tmp_path: Path) -> None:
    one = settings("tp4", kv_heads=4, mlp_hidden=81)
    with pytest.raises(CannotRun, match="tp4 cannot be traced: a and b must have same reduction dim"):
        run(one, tmp_path)
    one.parallel, one.baseline = from_name("helix_1x4"), ["tp4"]
    run(one, tmp_path)
    (rival,) = json.loads((tmp_path / "dry_run.json").read_text())["baselines"]
    assert "same reduction dim" in rival["error"]


def test_times_come_with_what_they_are_worth(tmp_path: Path) -> None:
    one = settings("single")
    one.hardware = replace(hardware("dgx_h100"), time_error_share=0.12)
    run(one, tmp_path)
    assert band(0.12, "forward") in json.loads((tmp_path / "dry_run.json").read_text())["notes"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"profile": True}, "profile=true measures a step"),
        ({"ckpt": "somewhere"}, "ckpt= gives weights their numbers"),
        ({"parallel": ParallelConfig("tensor", m=1, n=2, stage=2)}, "2 pipeline stages"),
        ({"baseline": ["cp4"]}, "baseline=cp4 is another project's code"),
    ],
)
def test_what_cannot_be_traced_is_refused(changes: dict[str, Any], said: str) -> None:
    one = settings("helix_2x2")
    for key, value in changes.items():
        setattr(one, key, value)
    with pytest.raises(ConfigError, match=said):
        check_dry_run(one)
