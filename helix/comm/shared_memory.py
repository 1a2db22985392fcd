"""Small exchanges between the ranks of one host through memory that they share, in place of gloo's sockets.

Where more ranks than cores share a machine, what an exchange costs is not its bytes but waking every rank once for
each message: 7.9 ms for 2 kB on 12 ranks of 2 cores over gloo, 0.7 ms here (paper/LOG.md, 2026-11-22). Decoding does
nothing but such exchanges.

Each rank has a slot in one mapping. It writes its tensor there, all meet once, and each reads what it wants from
the others' slots. Two sets of slots take turns, so one meeting an exchange is enough: who comes to the next but one
knows that everybody has left this one. Ranks sleep in the kernel while they wait (futex) and leave the core to the
others; they meet at one of them, the host of the meeting, so that an exchange costs each other rank one sleep.

Linux on x86-64 only, where stores become visible in their order and the system call is known; elsewhere, and
between hosts or containers, gloo does it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import time
import zlib
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from helix.comm.mesh import Axis
from helix.config.environment import kernel_namespace, shares_memory

# Up to here the meeting is what costs; beyond it the bytes do, which gloo moves as well.
SLOT_BYTES = 65536
_LINE = 64  # bytes, a cache line: each rank's count of exchanges and a word beside it, and those of the meeting's end
_FORMS = 1000
_SYS_FUTEX, _WAIT, _WAKE, _ALL = 202, 0, 1, 2**31 - 1
_POLL_S = 1  # a sleeper looks at the clock this often


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Form(NamedTuple):
    """What one kind of tensor needs of the slots.

    Args:
        mark: which tensors of another shape or dtype do not have.
        whole: in each of the two sets of slots, [P, ..] of all ranks.
        own: this rank's of them.
    """

    mark: int
    whole: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


class Slots:
    """A mapping that all ranks of a group share.

    Args:
        memory: of `size_of(ranks)` bytes, zero at first.
        axis: whose ranks share it.
        timeout_s: after which a rank that waits for another gives up.
    """

    def __init__(self, memory: mmap.mmap, axis: Axis, timeout_s: float) -> None:
        # Not the axis itself: it has the group, which could then never be freed (see `_shared`).
        self._name, self._rank, self._size, self._timeout_s = axis.name, axis.rank, axis.size, timeout_s
        self._exchanges = 0
        self._words = (ctypes.c_int * ((axis.size + 1) * _LINE // 4)).from_buffer(memory)
        self._address = ctypes.addressof(self._words)
        self._futex = ctypes.CDLL(None, use_errno=True).syscall
        with torch.inference_mode(False):  # else nobody outside of it could write here
            room = torch.frombuffer(memory, dtype=torch.uint8)[(axis.size + 1) * _LINE :]
            self._slots = room.view(2, axis.size, SLOT_BYTES)
        self._forms: dict[tuple[torch.Size, torch.dtype], _Form] = {}

    def exchange(self, x: Tensor) -> Tensor:
        """x[..] of this rank -> [P, ..] of all, as a view that holds until the next exchange but one.

        Raises:
            RuntimeError: on every rank, if one has come with a tensor of another shape or dtype; or if one does not
                come in time.
        """
        self._exchanges += 1
        form, turn = self._form(x), self._exchanges % 2
        form.own[turn].copy_(x.detach())
        differs = self._meet(form.mark)
        if differs:
            raise RuntimeError(
                f"rank {differs} of the {self._name} axis came to exchange {self._exchanges} with another tensor than "
                f"rank 0; rank {self._rank} has {list(x.shape)} of {x.dtype}"
            )
        return form.whole[turn]

    def _form(self, x: Tensor) -> _Form:
        key = x.shape, x.dtype
        form = self._forms.get(key)
        if form is None:
            if len(self._forms) == _FORMS:  # of prompts of all lengths, say
                self._forms.clear()
            with torch.inference_mode(False):  # as above
                used = self._slots[:, :, : x.nbytes].view(x.dtype)
                first, second = (turn.view(self._size, *x.shape) for turn in used.unbind())
                own = first[self._rank], second[self._rank]
            mark = zlib.crc32(repr((*x.shape, str(x.dtype))).encode())
            form = self._forms[key] = _Form(mark, (first, second), own)
        return form

    def _meet(self, mark: int) -> int:
        """Wait until all are here; returns a rank whose mark is not rank 0's, or 0."""
        count, end = self._exchanges, self._size
        if self._rank:
            self._tell(self._rank, count, mark)
            self._await(end, count)
            return self._said(end)
        differs = 0
        for other in range(1, self._size):
            self._await(other, count)
            if self._said(other) != ctypes.c_int(mark).value:
                differs = other
        self._tell(end, count, differs)
        return differs

    def _said(self, line: int) -> int:
        return self._words[line * _LINE // 4 + 1]

    def _tell(self, line: int, count: int, word: int) -> None:
        """Leave a word in a line, and wake whoever waits there for this exchange."""
        self._words[line * _LINE // 4 + 1] = word
        self._words[line * _LINE // 4] = count  # the lower 32 bits
        address = ctypes.c_void_p(self._address + line * _LINE)
        self._futex(_SYS_FUTEX, address, _WAKE, ctypes.c_int(_ALL), None, None, 0)

    def _await(self, line: int, count: int) -> None:
        began = None
        # Rank 0 gives up first, since it knows who is missing.
        limit_s = self._timeout_s + (2 * _POLL_S if line == self._size else 0)
        address = ctypes.c_void_p(self._address + line * _LINE)
        # Counts are compared on a circle: they begin anew after 2**32 exchanges.
        while ctypes.c_int((seen := self._words[line * _LINE // 4]) - count).value < 0:
            if began is None:
                began = time.monotonic()
            elif time.monotonic() - began > limit_s:
                who = f"rank {line}" if line < self._size else "rank 0"
                raise RuntimeError(
                    f"{who} of the {self._name} axis has not come to exchange {count} within {limit_s:.0f} s; "
                    f"rank {self._rank} is there"
                )
            self._futex(_SYS_FUTEX, address, _WAIT, ctypes.c_int(seen), ctypes.byref(_Timespec(_POLL_S, 0)), None, 0)


def size_of(ranks: int) -> int:
    """Bytes of a mapping: a line for each rank and one for the meeting's end, and two slots for each rank."""
    return (ranks + 1) * _LINE + 2 * ranks * SLOT_BYTES


_shared: WeakKeyDictionary[dist.ProcessGroup, Slots | None] = WeakKeyDictionary()


def slots_for(x: Tensor, axis: Axis) -> Slots | None:
    """The slots for exchanging x, whose size is the same on all ranks of the axis; None if gloo or NCCL has to do it.

    The first call for a group is collective, as the exchange is that follows it.
    """
    if not axis.exchanges or not x.is_cpu or not 0 < x.nbytes <= SLOT_BYTES:
        return None
    group = axis.group
    assert group is not None
    if group not in _shared:
        _shared[group] = _share(axis, group)
    return _shared[group]


def _share(axis: Axis, group: dist.ProcessGroup) -> Slots | None:
    """A mapping on all ranks of the group, or on none."""
    kernels: list[str] = [""] * axis.size
    dist.all_gather_object(kernels, _kernel(), group=group)
    if not kernels[0] or len(set(kernels)) > 1:
        return None
    size = size_of(axis.size)
    descriptor = _make(size) if axis.rank == 0 else None
    path = ["" if descriptor is None else f"/proc/{os.getpid()}/fd/{descriptor}"]
    dist.broadcast_object_list(path, group=group, group_src=0)
    memory = _open(path[0], size)
    everyone: list[bool] = [False] * axis.size
    dist.all_gather_object(everyone, memory is not None, group=group)
    if descriptor is not None:
        os.close(descriptor)
    if memory is None or not all(everyone):
        return None
    return Slots(memory, axis, _timeout_s(group))


def _kernel() -> str:
    """What only ranks have in common that can open each other's memory; empty where there is no futex."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shares_memory():
        return ""
    return kernel_namespace()


def _make(size: int) -> int | None:
    """Memory without a name: it goes with the last rank that has it, however that one ends."""
    try:
        descriptor = os.memfd_create("helix-exchange")
    except OSError:  # no descriptors left, or forbidden
        return None
    try:
        os.truncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _open(path: str, size: int) -> mmap.mmap | None:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # another user's, or hidden by the container
        return None
    try:
        return mmap.mmap(descriptor, size)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _timeout_s(group: dist.ProcessGroup) -> float:
    """Of the launch's own collectives, so that both ways of moving give up after the same time."""
    whole = dist.group.WORLD
    asked = whole if whole is not None and dist.get_backend() == "gloo" else group
    return float(asked._get_backend(torch.device("cpu")).options._timeout.total_seconds())
