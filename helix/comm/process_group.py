"""The default process group of one rank, by keys that no earlier group of its launcher's store had."""

from __future__ import annotations

import itertools
import json
import os
import time
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

# This process's connection to the launcher's store, and the number of its next process group.
_connected: list[tuple[dist.Store, int, int]] = []
_groups = itertools.count()
_POLL_S = 0.01


def own_device(kind: str) -> torch.device:
    """This rank's device, where its ranks' are of this kind: cpu or cuda."""
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


class ProcessGroup:
    """The default process group for one rank's work, torn down on every way out."""

    def __init__(self, device: str, timeout_s: float) -> None:
        self.device, self.timeout = device, timedelta(seconds=timeout_s)

    def __enter__(self) -> None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        store, rank, ranks = _own_store(self.timeout)
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks, timeout=self.timeout
        )
        # One that is done early closes its connections, and would be taken for one that crashed by a late one.
        dist.barrier()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the others may be stuck in a collective, and destroying the group would wait for them.
        if kind is None and dist.is_initialized():
            dist.barrier()  # another may still be connecting a group of its own
            dist.destroy_process_group()


def launchers_store(timeout: timedelta = timedelta(minutes=10)) -> tuple[dist.Store, int, int]:
    """The launcher's store, which outlives the ranks if it starts them again; this rank, and the number of ranks.

    One connection serves all: without torchrun rank 0 is the server, and a new one might be taken for the old.
    """
    if not _connected:
        _connected.append(next(iter(dist.rendezvous("env://", timeout=timeout))))
    return _connected[0]


def _own_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Keys for one process group of this process, its rank and the number of ranks.

    Ranks of torchrun's launch again for each job of a sweep, and are started again when one was killed. The store is
    then the same, and holds the addresses of the last group, to which a rank that is early would connect; so each
    group has its own keys.
    """
    store, rank, ranks = launchers_store(timeout)
    group = dist.PrefixStore(f"helix-launch-{next(_groups)}", store)
    return dist.PrefixStore(_agreed_name(group, rank, ranks, timeout), group), rank, ranks


def _agreed_name(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A name that rank 0 has just made, on all ranks that are running now.

    Not the number of restarts: on several hosts each agent has its own count. What an earlier start of the ranks left
    in the store is told apart by the answer, which names the very ranks that asked.
    """
    own = uuid4().hex
    if rank == 0:
        store.set("name", own)
        keys = [f"{own}/{other}" for other in range(1, ranks)]
        store.wait(keys, timeout)
        store.set(f"{own}/ranks", json.dumps([own, *(store.get(key).decode() for key in keys)]))
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name: str = store.get("name").decode()
        store.set(f"{name}/{rank}", own)
        if store.check([f"{name}/ranks"]) and json.loads(store.get(f"{name}/ranks"))[rank] == own:
            return name
        time.sleep(_POLL_S)
    raise TimeoutError(f"rank {rank} waited {timeout.total_seconds():.0f} s for rank 0 and the other ranks to start")
