"""The timeline of a step: readable, its phases named and nested, all ranks on one time axis; nothing without it."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks

from helix import Grid, HelixAttention
from helix.comm.mesh import Mesh
from helix.comm.record import phase, record
from helix.partition.schedules import SCHEDULES
from helix.study.profile import _merged, _of_rank, profiled

Event = dict[str, Any]
DEALT = {"attention.pack", "attention.core", "attention.unpack", "all_to_all/attention.out"}
PHASES = {
    "rows": DEALT | {"all_to_all/attention.q", "all_gather/attention.kv"},
    "batch": DEALT | {"all_to_all/attention.qkv"},
    "heads": DEALT | {"all_to_all/attention.qkv"},
    "gather": {"attention.pack", "attention.core", "all_gather/attention.qk"},
    "score": {"attention.scores", "attention.core", "all_reduce/attention.scores"},
    "perslice": {"attention.core"},
}
AROUND = {
    "step",
    "attention.project_in",
    "attention.schedule",
    "attention.project_out",
    "all_reduce/attention.leave",
}


def run_profiled(folder: Path, schedules: list[str]) -> None:
    mesh = Mesh(Grid(m=2, n=1))
    x = torch.ones(2, 4, 16)
    for schedule in schedules:
        layer = HelixAttention(16, 2, mesh=mesh, schedule=schedule)
        layer.init_weights(1)
        with torch.inference_mode(), record() as log:
            y = profiled(lambda layer=layer: layer(x), folder / schedule, x.device)  # type: ignore[misc]
            assert torch.equal(y, layer(x))
        # Whoever listens hears the same, profiled or not.
        assert all(calls % 2 == 0 for calls in log.calls.values())


def read(path: Path) -> list[Event]:
    with gzip.open(path, "rt") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    return events


def phases(events: list[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") == "user_annotation"]


def processes(events: list[Event]) -> dict[int, str]:
    return {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}


def check_nesting(events: list[Event]) -> None:
    """On each thread two phases are apart or one holds the other."""
    threads = {(event["pid"], event["tid"]) for event in events}
    for thread in threads:
        mine = sorted(
            (event for event in events if (event["pid"], event["tid"]) == thread), key=lambda e: (e["ts"], -e["dur"])
        )
        holding: list[float] = []
        for event in mine:
            start, end = event["ts"], event["ts"] + event["dur"]
            while holding and holding[-1] <= start:
                holding.pop()
            # Start and duration are rounded to a nanosecond each.
            assert not holding or end <= holding[-1] + 0.002, event["name"]
            holding.append(end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile")
    on_ranks(2, run_profiled, path, list(PHASES), timeout_s=40)
    return path


def test_every_schedule_has_its_phases() -> None:
    assert set(PHASES) == set(SCHEDULES)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("schedule", PHASES)
def test_a_ranks_timeline_names_its_phases(folder: Path, schedule: str, rank: int) -> None:
    events = read(folder / schedule / f"trace_rank{rank}.json.gz")
    assert list(processes(events).values()) == [f"rank {rank}"]
    named = phases(events)
    assert {event["name"] for event in named if "." in event["name"] or event["name"] == "step"} == (
        PHASES[schedule] | AROUND
    )
    check_nesting(named)
    (step,) = (event for event in named if event["name"] == "step")
    inside = [event for event in named if "attention" in event["name"]]
    assert all(
        step["ts"] <= event["ts"] and event["ts"] + event["dur"] <= step["ts"] + step["dur"] for event in inside
    )


def test_all_ranks_are_on_one_time_axis(folder: Path) -> None:
    events = read(folder / "rows" / "trace.json.gz")
    assert sorted(processes(events).values()) == ["rank 0", "rank 1"]
    check_nesting(phases(events))
    collectives = [event for event in phases(events) if event["name"] == "all_to_all/attention.q"]
    first, second = sorted(collectives, key=lambda event: event["pid"])
    assert first["pid"] != second["pid"]
    # Neither rank can leave the exchange before the other has come to it.
    assert first["ts"] < second["ts"] + second["dur"]
    assert second["ts"] < first["ts"] + first["dur"]


def test_traces_with_another_zero_and_with_kernels_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's are: devices that have numbers, arrows between threads, and devices that nothing ran on."""
    monkeypatch.setattr("os.getpid", lambda: 4321)

    def trace(base_ns: int) -> dict[str, Any]:
        events = [
            {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": "python"}}
            for pid in (4321, 0, 1)
        ]
        events += [{"ph": "X", "name": "launch", "pid": 4321, "tid": 4321, "ts": 1.0, "dur": 1.0}]
        events += [{"ph": "s", "name": "ac2g", "id": 5, "pid": 4321, "tid": 4321, "ts": 1.0}]
        events += [{"ph": "X", "name": "kernel", "pid": 0, "tid": 7, "ts": 2.0, "dur": 1.0}]
        events += [{"ph": "f", "name": "ac2g", "id": 5, "pid": 0, "tid": 7, "ts": 2.0}]
        events += [{"ph": "i", "name": "Record Window End", "pid": "", "tid": "", "ts": 9.0}]
        return {"baseTimeNanoseconds": base_ns, "traceEvents": events}

    merged = _merged(_of_rank(trace(base), rank) for rank, base in enumerate((10_000, 13_000)))["traceEvents"]
    assert sorted(processes(merged).values()) == ["rank 0", "rank 0, device 0", "rank 1", "rank 1, device 0"]
    assert [event["ts"] for event in merged if event["name"] == "kernel"] == [2.0, 5.0]
    ids = [event["id"] for event in merged if "id" in event]
    assert (ids[0], ids[2]) == (ids[1], ids[3])
    assert ids[0] != ids[2]
    assert not any(event["name"] == "Record Window End" for event in merged)


def test_without_a_profiler_a_phase_is_nothing() -> None:
    assert phase("a") is phase("b")
    assert isinstance(phase("a"), nullcontext)
