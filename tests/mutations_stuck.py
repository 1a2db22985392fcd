"""Ranks that disagree: what one of four does otherwise than the others, and what debug mode has to say of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from helix.attention.layer import HelixAttention
from helix.comm import transport
from helix.comm.mesh import Axis, Mesh
from helix.comm.point_to_point import receive, send

ODD = 3  # the rank that differs


@dataclass(frozen=True)
class Stuck:
    """One way to disagree.

    Args:
        work: on a 2 x 2 grid; the flag is set on rank `ODD` alone.
        said: a pattern of what every rank that waits raises.
        waits: whether the odd rank is one of these.
    """

    name: str
    work: Callable[[Mesh, bool], object]
    said: str
    waits: bool = True


def _gather(axis: Axis, name: str = "attention.qkv", rows: int = 4, dtype: torch.dtype = torch.float32) -> None:
    transport.all_gather(torch.ones(rows, 8, dtype=dtype), axis, name)


def _swapped(mesh: Mesh, odd: bool) -> None:
    for name in ("b", "a") if odd else ("a", "b"):
        _gather(mesh.model, name)


def _swapped_axes(mesh: Mesh, odd: bool) -> None:
    """Each of two groups has come to its own, for ever."""
    first, second = (mesh.slice, mesh.head) if odd or dist.get_rank() == 0 else (mesh.head, mesh.slice)
    _gather(first)
    _gather(second)


def _schedule(mesh: Mesh, odd: bool) -> None:
    """The same layer of the same weights, which one rank computes in another way."""
    layer = HelixAttention(16, 4, mesh=mesh, schedule="gather" if odd else "rows")
    with torch.no_grad():
        layer(torch.ones(4, 4, 16))


def _fewer(mesh: Mesh, odd: bool) -> None:
    for _ in range(2 if odd else 3):
        _gather(mesh.model)


def _skipped(mesh: Mesh, odd: bool) -> None:
    if not odd:
        _gather(mesh.slice)
    _gather(mesh.model, "next")


def _shares(mesh: Mesh, odd: bool) -> None:
    send_rows = [2, 1, 1, 1] if odd else [1] * 4
    transport.all_to_all(torch.ones(sum(send_rows), 8), mesh.model, send_rows, [1] * 4, "attention.out")


def _returned(mesh: Mesh, odd: bool) -> None:
    if not odd:
        _gather(mesh.model)


def _raised(mesh: Mesh, odd: bool) -> None:
    if odd:
        raise ValueError("a fault of its own")
    _gather(mesh.model)


def _asleep(mesh: Mesh, odd: bool) -> None:
    if odd:
        time.sleep(2.5)
    _gather(mesh.model)


def _transfer(mesh: Mesh, odd: bool) -> None:
    if mesh.slice.rank == 0:
        send(torch.ones(4, 8), mesh.slice, 1, "activations").wait()
    else:
        receive((4, 6 if odd else 8), torch.float32, torch.device("cpu"), mesh.slice, 0, "activations")
    _gather(mesh.model)


def _library(mesh: Mesh, odd: bool) -> None:
    x = torch.ones(4)
    if odd:
        dist.broadcast(x, 0)
    else:
        dist.all_reduce(x)


MODEL = r"of the model axis \(ranks 0-3\)"
STUCK = (
    Stuck(
        "another collective",
        lambda mesh, odd: (transport.reduce_scatter if odd else transport.all_gather)(
            torch.ones(4, 8), mesh.model, "x"
        ),
        rf"rank 3 came to collective \d+ {MODEL} with reduce_scatter/x .*; ranks 0-2 with all_gather/x .*",
    ),
    Stuck(
        "another shape",
        lambda mesh, odd: _gather(mesh.model, rows=5 if odd else 4),
        rf"rank 3 came to .* {MODEL} with .* \[5, 8\] float32; ranks 0-2 with .* \[4, 8\] float32 .*",
    ),
    Stuck(
        "another dtype",
        lambda mesh, odd: _gather(mesh.model, dtype=torch.float64 if odd else torch.float32),
        r"rank 3 came to .* float64; ranks 0-2 .* float32 .*",
    ),
    Stuck(
        "another schedule",
        _schedule,
        r"rank 3 came to .* of the slice axis \(ranks 2-3\) with all_gather/.*; rank 2 with all_to_all/.*",
    ),
    Stuck("fewer of them", _fewer, rf"rank 3 has returned .*, and does not come to collective 3 {MODEL}, .*", False),
    Stuck("two swapped", _swapped, r"rank 3 came to .* with all_gather/b .*; ranks 0-2 with all_gather/a .*"),
    Stuck(
        "two of different axes swapped",
        _swapped_axes,
        r"ranks wait for each other in a circle: (.*; )?rank 3 waits for rank 2 in .* of the slice axis .*",
    ),
    Stuck(
        "one skipped",
        _skipped,
        r"ranks wait for each other in a circle: (.*; )?rank 3 waits for rank \d in .*/next .*",
    ),
    Stuck(
        "another group",
        lambda mesh, odd: _gather(mesh.head if odd else mesh.slice),
        r"rank 1 has returned .* \(ranks 1 and 3\), .*, where rank 3 waits|.* rank 3 waits for rank 1 .*",
    ),
    Stuck("other shares", _shares, r"rank 3 came to .* to send 2 rows to rank 0, which came to receive 1 .*"),
    Stuck("returned early", _returned, r"rank 3 has returned .*, and does not come to collective .*", False),
    Stuck("raised", _raised, r"rank 3 has raised ValueError: a fault of its own .*, and does not come to .*", False),
    Stuck(
        "does not come",
        _asleep,
        r"rank 3 has not come to .* within 1 s, where ranks 0-2 wait; the last that rank 3 came to is .*|"
        r"rank 3 has not come to .*; rank 3 has come to no collective .*",
    ),
    Stuck("a transfer of another shape", _transfer, r"rank 3 came to .* with recv/activations \[4, 6\] .*"),
    Stuck("another library's", _library, r"rank 3 came to .* with broadcast/.*; ranks 0-2 with all_reduce/.*"),
)
