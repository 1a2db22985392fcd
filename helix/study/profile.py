"""One step's timeline on every rank, for https://ui.perfetto.dev or chrome://tracing.

    FOLDER/trace_rank{r}.json.gz   one rank
    FOLDER/trace.json.gz           all ranks, one row of threads each, on one time axis

The phases of the model (`helix.comm.record.phase`) lie nested under "step", and PyTorch's operators under them.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

T = TypeVar("T")

# Chrome's format: {"baseTimeNanoseconds": n, "traceEvents": [{"ph": kind, "pid": .., "ts": microseconds since n}]}
Trace = dict[str, Any]

_ROWS = 100  # process numbers for each rank: its process and its devices


def keep_quiet() -> None:
    """Before a process's first profile: its library would announce each start and stop on the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def profiled(step: Callable[[], T], folder: Path, device: torch.device) -> T:
    """Run one step under PyTorch's profiler and write what it did. Every rank calls it.

    Several hosts need not share the folder: the file of all ranks then has those of rank 0's host. Their clocks
    differ by what their operating systems leave between them.

    Args:
        step: what to run, on all ranks together.
        folder: where to; made if need be.
        device: of this rank; with CUDA its kernels are in the trace.

    Returns:
        What the step returned.
    """
    keep_quiet()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    dist.barrier()
    with torch.profiler.profile(activities=activities) as profile:
        dist.barrier()  # starting the profiler takes each rank another time
        with torch.profiler.record_function("step"):
            result = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank()
    _write(_of_rank(_exported(profile), rank), folder / _name(rank))
    dist.barrier()
    if rank == 0:
        paths = (folder / _name(other) for other in range(dist.get_world_size()))
        _write(_merged(_read(path) for path in paths if path.exists()), folder / "trace.json.gz")
    return result


def _name(rank: int) -> str:
    return f"trace_rank{rank}.json.gz"


def _exported(profile: torch.profiler.profile) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace: Trace = json.loads(path.read_text(errors="replace"))
    return trace


def _of_rank(trace: Trace, rank: int) -> Trace:
    """The trace with its process and devices named and numbered by rank, so that several fit into one file."""
    own = os.getpid()
    # The profiler's own events have words for process numbers. It also names devices that this rank does not use.
    events = [event for event in trace["traceEvents"] if isinstance(event.get("pid"), int)]
    used = sorted({event["pid"] for event in events if event["ph"] != "M"}, key=lambda pid: (pid != own, pid))
    first = (rank + 1) * _ROWS  # 0 would be the idle process
    number = {pid: first + row for row, pid in enumerate(used)}
    out = []
    for pid, row in number.items():
        name = f"rank {rank}" if pid == own else f"rank {rank}, device {pid}"
        out.append({"ph": "M", "name": "process_name", "pid": row, "tid": 0, "args": {"name": name}})
        out.append({"ph": "M", "name": "process_sort_index", "pid": row, "tid": 0, "args": {"sort_index": row}})
    for event in events:
        if event["pid"] not in number or event["name"].startswith("process_"):
            continue
        event["pid"] = number[event["pid"]]
        if "id" in event:  # an arrow from a launch to its kernel; the number is the same on every rank
            event["id"] = first << 32 | int(event["id"])
        out.append(event)
    return trace | {"traceEvents": out}


def _merged(traces: Iterable[Trace]) -> Trace:
    """All ranks' events, their times counted from the first one's zero."""
    out: Trace = {}
    for trace in traces:
        if not out:
            out = trace
            continue
        shift_us = (trace["baseTimeNanoseconds"] - out["baseTimeNanoseconds"]) / 1e3
        for event in trace["traceEvents"]:
            if "ts" in event:
                event["ts"] += shift_us
        out["traceEvents"] += trace["traceEvents"]
    return out


def _read(path: Path) -> Trace:
    with gzip.open(path, "rt") as file:
        trace: Trace = json.load(file)
    return trace


def _write(trace: Trace, path: Path) -> None:
    with gzip.open(path, "wt") as file:
        json.dump(trace, file, separators=(",", ":"))
