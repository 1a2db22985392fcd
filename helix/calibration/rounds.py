"""Operations that take turns on ranks, and what their times say.

A pass runs every operation for some milliseconds, and every second pass goes through them backwards, so that a drift
of the machine falls on all alike. The pass is the sample, and a figure is the median of its passes, with an interval
that assumes no distribution: on a machine that others use a mean would follow the worst pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from helix.study.progress import progress_bar

Key = TypeVar("Key")
Clock = Callable[[], float]
LEAST_S = 8e-3  # of one operation in one pass: far longer than the ends of a barrier differ
MOST_CALLS = 500


def timed(
    works: Mapping[Key, Callable[[], object]],
    device: torch.device,
    rounds: int,
    title: str,
    clock: Clock = time.monotonic,
) -> dict[Key, list[float]]:
    """Seconds of one call of each operation on this rank, in each pass. All ranks call it with the same operations.

    Args:
        title: of the progress bar.
        clock: for operations of one rank alone, a core's own time: what other processes take of it does not count.
    """
    with torch.inference_mode(), progress_bar(stderr=True) as progress:
        task = progress.add_task(title, total=rounds + 1)
        calls = _calls(works, device, clock)
        out: dict[Key, list[float]] = {key: [] for key in works}
        for turn in range(rounds):
            progress.advance(task)
            progress.refresh()
            for key in list(works) if turn % 2 == 0 else list(works)[::-1]:
                out[key].append(_seconds(works[key], calls[key], device, clock))
        return out


def slowest(ranks: Sequence[Mapping[Key, list[float]]]) -> dict[Key, list[float]]:
    """Each pass's time of the slowest rank, for whom the others wait."""
    return {key: [max(times) for times in zip(*(rank[key] for rank in ranks), strict=True)] for key in ranks[0]}


def _calls(works: Mapping[Key, Callable[[], object]], device: torch.device, clock: Clock) -> dict[Key, int]:
    """How often to call each in a pass: as often on every rank, after some calls to warm up."""
    for work in works.values():
        work()
    alone = [_seconds(work, 2, device, clock) for work in works.values()]
    longest = torch.tensor(alone, dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    counts = [min(MOST_CALLS, max(1, math.ceil(LEAST_S / each))) for each in longest.tolist()]
    return dict(zip(works, counts, strict=True))


def _seconds(work: Callable[[], object], calls: int, device: torch.device, clock: Clock) -> float:
    dist.barrier()
    _finish(device)
    start = clock()
    for _ in range(calls):
        work()
    _finish(device)
    return (clock() - start) / calls


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
