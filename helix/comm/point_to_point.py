"""Transfers between neighbours of one mesh axis, without gradients; counted, and checked in debug mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from helix.comm.mesh import Axis
from helix.comm.record import Call, phase, telling
from helix.flight import checking, ring
from helix.flight.ring import Entry


class Sending:
    """A tensor on its way; it is kept until it has arrived."""

    def __init__(self, x: Tensor, work: dist.Work, call: Call, entry: Entry) -> None:
        self._x, self._work, self._call, self._entry = x, work, call, entry

    def wait(self) -> None:
        if (checks := checking.active()) is not None:
            checks.arrive(self._entry)
        self._call.block()
        self._work.wait()
        self._call.finish()
        self._entry.end(self._x.device)


def send(x: Tensor, axis: Axis, to: int, name: str) -> Sending:
    """x -> rank `to` of the axis, which calls `receive`; in the background."""
    x, group = x.contiguous(), _group(axis)
    ranks = dist.get_rank(), dist.get_process_group_ranks(group)[to]
    entry = ring.come_to_transfer(f"send/{name}", axis.name, *ranks, x.nbytes, x.shape, x.dtype)
    if (checks := checking.active()) is not None:
        checks.send(entry)
    with telling(entry.key, x.nbytes, ranks, x.device) as call:
        work = dist.isend(x, group=group, group_dst=to)
    assert work is not None
    return Sending(x, work, call, entry)


def receive(shape: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis, of: int, name: str) -> Tensor:
    """What rank `of` of the axis sends, in the order in which it sends."""
    x, group = torch.empty(*shape, dtype=dtype, device=device), _group(axis)
    ranks = dist.get_process_group_ranks(group)[of], dist.get_rank()
    entry = ring.come_to_transfer(f"recv/{name}", axis.name, *ranks, 0, x.shape, dtype)
    if (checks := checking.active()) is not None:
        checks.receive(entry)
    with telling(entry.key, 0, entry.course.ranks, device) as call, phase(entry.key):
        work = dist.irecv(x, group=group, group_src=of)
        assert work is not None
        work.wait()
        call.finish()
    entry.end(device)
    return x


def _group(axis: Axis) -> dist.ProcessGroup:
    assert axis.group is not None
    return axis.group
