"""The default process group of one rank, by keys that no earlier group of its launcher's store had.

On several hosts processes are numbered anew when it is made (`helix.partition.placement`), so that everywhere else a
rank is a position on the mesh. In it the environment's RANK is the new number too, which Lightning, DeepSpeed and
transformers read.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from contextlib import ExitStack, suppress
from datetime import timedelta
from types import TracebackType
from uuid import uuid4

import torch
import torch.distributed as dist

from helix.config.environment import debug_limit_s
from helix.flight import ring
from helix.partition.grid import PartitionError
from helix.partition.placement import AUTO, Placed, place
from helix.ranks.heartbeat import Heartbeat
from helix.ranks.hosts import Hosts, hosts_of, own_host
from helix.ranks.interface import choose_interface

# This process's connection to the launcher's store, and the number of its next process group.
_connected: list[tuple[dist.Store, int, int]] = []
_groups = itertools.count()
_hosts: list[Hosts] = []  # of the process group that there is
_POLL_S = 0.01
# A rank that dies before its first word, on another host, is noticed by nobody: so long its first group is waited for.
_COME_S = 120.0
# And later ones, for which rank 0 may have tables and plots to make first.
_COME_AGAIN_S = 600.0


def own_device(kind: str) -> torch.device:
    """This rank's device, where its ranks' are of this kind: cpu or cuda."""
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


def hosts() -> Hosts:
    """The hosts of the ranks that are running."""
    return _hosts[-1]


class ProcessGroup:
    """The default process group for one rank's work, torn down on every way out.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL).
        timeout_s: after which a collective that waits for a missing rank gives up.
        placement, slices: see `helix.partition.placement.place`.
        watched: whether the ranks watch each other (`helix.ranks.heartbeat`), as nobody else does it on several hosts.

    Raises:
        PartitionError: on every rank, when it is entered, if the placement cannot be kept on the ranks' hosts.
    """

    def __init__(
        self, device: str, timeout_s: float, placement: str = AUTO, slices: int = 1, watched: bool = False
    ) -> None:
        self.device, self.timeout = device, timedelta(seconds=timeout_s)
        self.placement, self.slices = placement, slices
        self._undo = ExitStack()  # of what is this group's, and the process's
        self._watched = watched
        self._heartbeat: Heartbeat | None = None

    def __enter__(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        store, number, said = _own_store(self.timeout)
        if self._watched and len(said) > 1:
            self._heartbeat = Heartbeat(store, number, said)
        try:
            self._join(store, number, said)
        except BaseException as error:
            # A placement that the hosts cannot keep is no rank's fault: all raise it.
            self._part(error, blame=not isinstance(error, PartitionError))
            raise

    def _join(self, store: dist.Store, number: int, said: list[str]) -> None:
        if self.device != "cuda":
            torch.set_num_threads(_own_cores(store, number, said))
        placed, refused = self._place(said)
        rank = placed.positions[number]
        if self._heartbeat is not None:
            self._heartbeat.place(placed.positions)
        choose_interface(store, number, hosts_of(said).of)
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=len(said),
            timeout=self.timeout,
        )
        # One that is done early closes its connections, and would be taken for one that crashed by a late one.
        dist.barrier()
        if refused is not None:  # only now, when all know: the launcher's store may end with rank 0
            dist.destroy_process_group()
            raise refused
        by_rank = sorted(zip(placed.positions, said, strict=True))
        _hosts.append(hosts_of([host for _, host in by_rank], placed.taken))
        self._undo.callback(_hosts.pop)
        self._undo.callback(os.environ.__setitem__, "RANK", os.environ["RANK"])
        os.environ["RANK"] = str(rank)
        if (limit_s := debug_limit_s()) is not None:
            from helix.comm.debug import checked  # brings DTensor

            self._undo.enter_context(checked(limit_s))

    def _place(self, said: list[str]) -> tuple[Placed, PartitionError | None]:
        """Every process's position by what they said of their hosts; if there is none, why."""
        known = hosts_of(said).of
        try:
            return place(self.placement, known, self.slices), None
        except PartitionError as error:
            return place(AUTO, known, self.slices), error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(Exception):  # the group may be gone; what is raised is why
                ring.write(reason=f"{type(error).__name__}: {error}")
            self._part(error)
            return
        try:
            self._undo.close()
            # After an error the others may be stuck in a collective, and destroying the group would wait for them.
            if dist.is_initialized():
                dist.barrier()  # another may still be connecting a group of its own
                dist.destroy_process_group()
        except BaseException as late:
            self._part(late)
            raise
        _forget_parts()
        if self._heartbeat is not None:
            self._heartbeat.leave()

    def _part(self, error: BaseException, blame: bool = True) -> None:
        """Put back what is the process's, and have the other ranks know of an error."""
        with suppress(Exception):  # debug mode's store may be gone
            self._undo.__exit__(type(error), error, error.__traceback__)
        _forget_parts()
        if self._heartbeat is None:
            return
        if blame and isinstance(error, Exception):
            self._heartbeat.blame(error)
        else:  # or this rank was told to stop
            self._heartbeat.leave()


def _own_cores(store: dist.Store, number: int, said: list[str]) -> int:
    """This rank's share of the cores that it may use, among the ranks that may use the same.

    Those of torchrun may use all of their host's; SLURM binds each, as a rule, to some that are its own.
    """
    own = json.dumps(sorted(os.sched_getaffinity(0)))
    store.set(f"cores/{number}", own)
    here = [f"cores/{other}" for other, host in enumerate(said) if host == said[number]]
    sharing = sum(each.decode() == own for each in store.multi_get(here))
    return max(1, len(os.sched_getaffinity(0)) // sharing)


def _forget_parts() -> None:
    """Have DTensor forget which parts of tensors were this rank's.

    It keeps them by the tensor's and the mesh's shape. In the next job of a sweep, whose placement is another, this
    process may be another rank, and would give the wrong parts: answers were wrong by 1.2 of their size.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()


def launchers_store() -> tuple[dist.Store, int, int]:
    """The launcher's store, which outlives the ranks if it starts them again; its number of this process, and of all.

    One connection serves all: without torchrun rank 0 is the server, and a new one might be taken for the old.

    Raises:
        TimeoutError: if it, or a rank that it waits for, does not come in time.
    """
    if not _connected:
        try:
            _connected.append(next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=_COME_S)))))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            said = str(error).splitlines()[0].rstrip(".")
            raise TimeoutError(f"rank {os.environ['RANK']} met not all others at {where} ({said})") from None
    return _connected[0]


def _own_store(timeout: timedelta) -> tuple[dist.Store, int, list[str]]:
    """Keys for one process group of this process, the launcher's number of it, and what all said of their hosts.

    Ranks of torchrun's launch again for each job of a sweep, and are started again when one was killed. The store is
    then the same, and holds the addresses of the last group, to which a rank that is early would connect; so each
    group has its own keys.
    """
    store, rank, ranks = launchers_store()
    number = next(_groups)
    group = dist.PrefixStore(f"helix-launch-{number}", store)
    limit = timedelta(seconds=_COME_AGAIN_S if number else _COME_S)
    name, said = _agree(group, rank, ranks, min(timeout, limit))
    return dist.PrefixStore(name, group), rank, said


def _agree(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> tuple[str, list[str]]:
    """A name that rank 0 has just made, on all ranks that are running now, and the host of each.

    Not the number of restarts: on several hosts each agent has its own count. What an earlier start of the ranks left
    in the store is told apart by the answer, which names the very ranks that asked.
    """
    own, host = uuid4().hex, own_host()
    if rank == 0:
        store.set("name", own)
        _wait_for_all(store, own, ranks, timeout)
        answers = [[own, host], *(json.loads(store.get(f"{own}/{other}")) for other in range(1, ranks))]
        store.set(f"{own}/ranks", json.dumps(answers))
        return own, [each for _, each in answers]
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if store.check(["name"]):
            name: str = store.get("name").decode()
            store.set(f"{name}/{rank}", json.dumps([own, host]))
            if store.check([f"{name}/ranks"]):
                answers = json.loads(store.get(f"{name}/ranks"))
                if answers[rank][0] == own:
                    return name, [each for _, each in answers]
        time.sleep(_POLL_S)
    raise TimeoutError(f"rank {rank} waited {timeout.total_seconds():.0f} s for rank 0 and the other ranks to start")


def _wait_for_all(store: dist.Store, name: str, ranks: int, timeout: timedelta) -> None:
    try:
        store.wait([f"{name}/{other}" for other in range(1, ranks)], timeout)
    except dist.DistStoreError:
        missing = [str(other) for other in range(1, ranks) if not store.check([f"{name}/{other}"])]
        few = ", ".join(missing[:8]) + (", .." if len(missing) > 8 else "")
        which = f"rank {few} of {ranks} has" if len(missing) == 1 else f"ranks {few} of {ranks} have"
        raise TimeoutError(
            f"{which} not come within {timeout.total_seconds():.0f} s of rank 0: ended before a first word (see the "
            "output there), or on a host that does not reach rank 0's"
        ) from None
