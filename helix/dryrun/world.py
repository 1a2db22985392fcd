"""A process group that is none: this process is one of any number of ranks, and what it sends goes nowhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from helix.comm.mesh import DIRECT

DEVICE = torch.device("meta")


class _Devices:
    """What DTensor asks of the module of a kind of device, of which the meta device has none.

    Args:
        per_host: by which DTensor weighs one way of moving data against another.
    """

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host

    def device_count(self) -> int:
        return self._per_host

    def is_initialized(self) -> bool:
        return True


@contextmanager
def pretended(ranks: int, per_host: int = 1, direct: bool = False) -> Iterator[None]:
    """Within, this is rank 0 of `ranks`. Collectives return at once, and leave in their output what was in it.

    Args:
        direct: whether collectives are built from direct exchanges, as over gloo, whose buffers they have then.
    """
    # It would warn of every DTensor that is copied: compiled code could not find this group, and nothing is compiled.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    assert not dist.is_initialized(), "a process has one default group"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    setattr(torch, DEVICE.type, _Devices(per_host))
    if direct:
        DIRECT.add("fake")
    try:
        yield
    finally:
        DIRECT.discard("fake")
        delattr(torch, DEVICE.type)
        dist.destroy_process_group()
