"""Transfers between neighbours of one mesh axis, without gradients; counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from helix.comm.mesh import Axis
from helix.comm.record import Call, counted, listening, telling


class Sending:
    """A tensor on its way; it is kept until it has arrived."""

    def __init__(self, x: Tensor, work: dist.Work, call: Call | None) -> None:
        self._x, self._work, self._call = x, work, call

    def wait(self) -> None:
        if self._call is not None:
            self._call.block()
        self._work.wait()
        if self._call is not None:
            self._call.finish()


def send(x: Tensor, axis: Axis, to: int, name: str) -> Sending:
    """x -> rank `to` of the axis, which calls `receive`; in the background."""
    x = x.contiguous()
    assert axis.group is not None
    if not listening():
        return Sending(x, _isend(x, axis.group, to), None)
    ranks = dist.get_process_group_ranks(axis.group)
    with telling(f"send/{name}", x.nbytes, (dist.get_rank(), ranks[to]), x.device) as call:
        return Sending(x, _isend(x, axis.group, to), call)


def receive(shape: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis, of: int, name: str) -> Tensor:
    """What rank `of` of the axis sends, in the order in which it sends."""
    x = torch.empty(*shape, dtype=dtype, device=device)
    group = axis.group
    assert group is not None

    def run() -> Tensor:
        work = dist.irecv(x, group=group, group_src=of)
        assert work is not None
        work.wait()
        return x

    return counted(f"recv/{name}", 0, device, group, run)


def _isend(x: Tensor, group: dist.ProcessGroup, to: int) -> dist.Work:
    work = dist.isend(x, group=group, group_dst=to)
    assert work is not None
    return work
