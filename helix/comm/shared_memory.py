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
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from helix.comm.mesh import Axis

# Up to here the meeting is what costs; beyond it the bytes do, which gloo moves as well.
SLOT_BYTES = 65536
SWITCH = "HELIX_SHARED_MEMORY"  # 0 in the environment leaves everything to gloo
_LINE = 64  # a counter to a cache line
_SYS_FUTEX, _WAIT, _WAKE, _ALL = 202, 0, 1, 2**31 - 1
_POLL_S = 1  # a sleeper looks at the clock this often


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Slots:
    """A mapping that all ranks of a group share.

    Args:
        memory: of `size_of(ranks)` bytes, zero at first.
        axis: whose ranks share it.
        timeout_s: after which a rank that waits for another gives up.
    """

    def __init__(self, memory: mmap.mmap, axis: Axis, timeout_s: float) -> None:
        self._axis, self._timeout_s, self._exchanges = axis, timeout_s, 0
        self._counters = (ctypes.c_int * ((axis.size + 1) * _LINE // 4)).from_buffer(memory)
        self._address = ctypes.addressof(self._counters)
        self._futex = ctypes.CDLL(None, use_errno=True).syscall
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._slots = whole[(axis.size + 1) * _LINE :].view(2, axis.size, SLOT_BYTES)

    def exchange(self, x: Tensor) -> Tensor:
        """x[..] of this rank -> [P, ..] of all, as a view that holds until the next exchange but one."""
        self._exchanges += 1
        slots = self._slots[self._exchanges % 2, :, : x.nbytes].view(x.dtype).view(-1, *x.shape)
        slots[self._axis.rank] = x
        self._meet()
        return slots

    def _meet(self) -> None:
        count, ranks = self._exchanges, self._axis.size
        if self._axis.rank == 0:
            for other in range(1, ranks):
                self._await(other, count)
            self._tell(ranks, count)
        else:
            self._tell(self._axis.rank, count)
            self._await(ranks, count)

    def _tell(self, counter: int, count: int) -> None:
        self._counters[counter * _LINE // 4] = count
        address = ctypes.c_void_p(self._address + counter * _LINE)
        self._futex(_SYS_FUTEX, address, _WAKE, ctypes.c_int(_ALL), None, None, 0)

    def _await(self, counter: int, count: int) -> None:
        began = None
        address = ctypes.c_void_p(self._address + counter * _LINE)
        while (seen := self._counters[counter * _LINE // 4]) < count:
            if began is None:
                began = time.monotonic()
            elif time.monotonic() - began > self._timeout_s:
                who = f"rank {counter}" if counter < self._axis.size else "rank 0, or one that it waits for,"
                raise RuntimeError(
                    f"{who} of the {self._axis.name} axis has not come to exchange {count} within "
                    f"{self._timeout_s:.0f} s; rank {self._axis.rank} is there"
                )
            self._futex(_SYS_FUTEX, address, _WAIT, ctypes.c_int(seen), ctypes.byref(_Timespec(_POLL_S, 0)), None, 0)


def size_of(ranks: int) -> int:
    """Bytes of a mapping: a counter for each rank and one for the meeting's end, and two slots for each rank."""
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
    descriptor, path = -1, [""]
    if axis.rank == 0:
        # Memory without a name: it goes with the last rank that has it, however that one ends.
        descriptor = os.memfd_create("helix-exchange")
        os.truncate(descriptor, size)
        path = [f"/proc/{os.getpid()}/fd/{descriptor}"]
    dist.broadcast_object_list(path, group=group, group_src=0)
    memory = _open(path[0], size)
    everyone: list[bool] = [False] * axis.size
    dist.all_gather_object(everyone, memory is not None, group=group)
    if descriptor >= 0:
        os.close(descriptor)
    if memory is None or not all(everyone):
        return None
    return Slots(memory, axis, _timeout_s())


def _kernel() -> str:
    """What only ranks have in common that can open each other's memory; empty where there is no futex."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or os.environ.get(SWITCH) == "0":
        return ""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


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


def _timeout_s() -> float:
    """Of the launch's own collectives, so that both ways of moving give up after the same time."""
    whole = dist.group.WORLD
    assert whole is not None
    return float(whole._get_backend(torch.device("cpu")).options._timeout.total_seconds())
