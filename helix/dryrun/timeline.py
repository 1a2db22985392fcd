"""A predicted timeline in the form of a measured one (`helix.study.profile`), for https://ui.perfetto.dev.

    FOLDER/predicted.json.gz   one row for what the rank computes, one for what it exchanges

Names and categories are those of a profile: phases and collectives are "user_annotation", PyTorch's operators
"cpu_op". Of the operators that PyTorch nests, only the innermost are there.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helix.dryrun.costs import Span, spans
from helix.dryrun.operators import EXCHANGE
from helix.dryrun.tracer import Trace
from helix.planner.machine import Machine

NAME = "predicted.json.gz"
# Numbers that a profile of the same rank leaves free, so that both files can be shown in one view.
_PROCESS = 199
_ROWS = ("computation", "exchange")


def write(passes: Sequence[tuple[str, Trace]], machine: Machine, folder: Path) -> Path:
    """Write the passes of rank 0, one after the other; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    with gzip.open(path, "wt") as file:
        json.dump(timeline(passes, machine), file, separators=(",", ":"))
    return path


def timeline(passes: Sequence[tuple[str, Trace]], machine: Machine) -> dict[str, Any]:
    """The trace-event format's JSON object: times in microseconds."""
    events: list[dict[str, Any]] = [_label("process_name", 0, "rank 0, predicted")]
    events += [_label("thread_name", row, name) for row, name in enumerate(_ROWS)]
    begin = 0.0
    for name, trace in passes:
        found = list(spans(trace, machine))
        end = max((span.end_s for span in found), default=0.0)
        for span in (Span(name, 0.0, end), *found):
            events.append(_event(span, begin))
        begin += end
    return {"displayTimeUnit": "ms", "baseTimeNanoseconds": 0, "traceEvents": events}


def _label(kind: str, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": row, "args": {"name": name}}


def _event(span: Span, begin: float) -> dict[str, Any]:
    one = span.operator
    exchanged = one is not None and one.kind == EXCHANGE
    event: dict[str, Any] = {
        "ph": "X",
        "cat": "user_annotation" if one is None or exchanged else "cpu_op",
        "name": span.name,
        "pid": _PROCESS,
        "tid": int(exchanged),
        "ts": (begin + span.start_s) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
    }
    if one is not None:
        event["args"] = {"part": one.part, "bytes": one.nbytes, "flops": one.flops}
    if exchanged and one is not None:
        event["args"] = {"part": one.part, "bytes": one.nbytes, "ranks": len(one.ranks)}
    return event
