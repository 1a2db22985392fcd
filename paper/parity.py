"""How exact the schedules are: `python -m paper.parity paper/results/DATE_parity.json`, a minute on two cores.

Runs the tests' own comparison (`tests/parity.py`: output, every gradient, every byte, on real ranks) on more and
larger grids than a test has time for, and keeps the errors that a test only bounds. Beside them, how far the papers'
formula is from the attention that it partitions, by slices and length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from helix import Grid, launch
from helix.attention.oracle import attention_oracle
from helix.partition.schedules import SCHEDULES, refusal
from helix.study.provenance import git_commit, now, versions

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from parity import Attention, Case, Result, run_all  # type: ignore[import-not-found]  # tests/ is no package

# Multi-head, grouped-query and one-head attention; rotary embeddings and QK-norm among them; with and without W_O.
ATTENTIONS = (
    Attention(16, 16, 16, batch=4, length=16, width=48),
    Attention(16, 4, 16, rope=True, batch=4, length=19, width=48),
    Attention(8, 4, 32, rope=True, qk_norm=True, batch=5, length=16, width=48),
    Attention(4, 4, 32, causal=False, projects=False, batch=4, length=17, width=128),
    Attention(1, 1, 64, batch=4, length=33, width=64),
)
GRIDS = (Grid(2, 2), Grid(4, 1), Grid(1, 4), Grid(4, 4), Grid(8, 2), Grid(2, 8), Grid(16, 1))
DTYPES = (torch.float32, torch.float64)
SLICES, LENGTHS, SAMPLES = (1, 2, 4, 8, 16), (16, 64, 256, 1024), 3
HEADS, HEAD_DIM = 4, 64


def cases(grid: Grid) -> list[Case]:
    """Every schedule that is legal, in both precisions, with the residual stream cut and whole."""
    return [
        Case(attention, schedule, stream=stream, dtype=dtype)
        for attention in ATTENTIONS
        if grid.fits(attention.layout)
        for schedule in SCHEDULES
        if refusal(schedule, attention.layout, grid, attention.batch, attention.length) is None
        for stream in ("replicated", "sharded")
        for dtype in DTYPES
    ]


def worst(results: Sequence[Sequence[Result]], tried: Sequence[Case]) -> list[dict[str, Any]]:
    """The largest errors of each schedule and precision over its cases and all ranks; bytes were asserted equal."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for place, case in enumerate(tried):
        key = case.schedule, str(case.dtype).removeprefix("torch.")
        row = rows.setdefault(key, {"schedule": key[0], "dtype": key[1], "cases": 0, "output": 0.0, "gradient": 0.0})
        row["cases"] += 1
        for rank in results:
            errors = dict(rank[place].errors)
            row["output"] = max(row["output"], errors.pop("y"))
            name = max(errors, key=lambda each: errors[each])
            if errors[name] > row["gradient"]:
                row |= {"gradient": errors[name], "gradient_of": name, "qk_norm": case.attention.qk_norm}
    return list(rows.values())


def distances() -> list[dict[str, float]]:
    """Relative distance (norms) of the papers' formula from h-head attention, by slices and length, fp64."""
    torch.manual_seed(0)
    heads, width = HEADS, HEAD_DIM
    rows = []
    for length in LENGTHS:
        for m in SLICES:
            found = []
            for _ in range(SAMPLES):
                x = torch.randn(1, length, heads * width, dtype=torch.float64)
                wq, wk, wv = (
                    torch.randn(3, heads, 1, width, heads * width, dtype=torch.float64) * (heads * width) ** -0.5
                )
                exact = attention_oracle(x, wq, wk, wv)
                found.append(float((attention_oracle(x, wq, wk, wv, slices=m) - exact).norm() / exact.norm()))
            rows.append({"slices": m, "length": length, "distance": sum(found) / len(found)})
    return rows


def main(path: Path) -> None:
    tried: list[Case] = []
    found: list[dict[str, Any]] = []
    for grid in GRIDS:
        these = cases(grid)
        results = launch(run_all, grid, these, ranks=grid.ranks, timeout_s=120)
        found += [{"grid": grid.name, "ranks": grid.ranks} | row for row in worst(results, these)]
        tried += these
        print(f"{grid.name}: {len(these)} cases, output, gradients and bytes", flush=True)
    content = {
        "cases": len(tried),
        "grids": [grid.name for grid in GRIDS],
        "bytes_agree": True,  # a rank asserts it of each case
        "narrowest": min(a.head_dim // max(g.m for g in GRIDS if g.fits(a.layout)) for a in ATTENTIONS if a.qk_norm),
        "worst": found,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "distances": distances(),
        "command": f"python -m paper.parity {path}",
        "git_commit": git_commit(),
        "made_at": now(),
        "versions": versions(),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
