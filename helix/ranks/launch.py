"""Running a function on ranks: forked on this machine, or the ones that torchrun or SLURM started.

Forking shares one import of torch among all ranks (16 ranks up in about a second; 16 interpreters on two
cores need 44). The parent must not have started torch's thread pool, which does not survive a fork.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from helix.config.environment import check_switches, started
from helix.flight import activity
from helix.partition.placement import AUTO, check_hosts
from helix.ranks.failure import RankError
from helix.ranks.fork import fork, killed
from helix.ranks.process_group import ProcessGroup, launchers_store

__all__ = ["RankError", "Restart", "agree", "launch", "restarted"]

T = TypeVar("T")


def launch(
    fn: Callable[..., T],
    *args: Any,
    ranks: int,
    device: str = "cpu",
    timeout_s: float = 600,
    max_restarts: int = 0,
    placement: str = AUTO,
    slices: int = 1,
) -> list[T]:
    """Run `fn(*args)` on every rank of a fresh process group and return each rank's result, by rank.

    Args:
        fn: any function, closures included (ranks are forked); its result must pickle.
        ranks: how many. Under torchrun or SLURM it must be the number they started.
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU a rank).
        timeout_s: seconds after which a collective that waits for a missing rank gives up.
        max_restarts: how often all ranks are started again, with `fn(*args)` from its beginning, after one was killed
            or ended without raising; `restarted()` tells them. A rank that raised would raise again, and ends it all.
            Ranks of torchrun or SLURM are started again by these, after failures of any kind
            (`torchrun --max-restarts`).
        placement: how torchrun's or SLURM's processes on several hosts are numbered anew
            (`helix.partition.placement`): `dist.get_rank()` may differ from the launcher's number, but for 0.
        slices: ranks of a slice group, which the placement is about.

    Raises:
        PartitionError: if the placement cannot be kept on the ranks' hosts.
        ConfigError: if HELIX_DEBUG or HELIX_SHARED_MEMORY is neither 0 nor 1.
        ValueError: if ranks is below 1, differs from the ranks that are running, or exceeds the GPUs.
        RankError: if a rank was killed or stopped, and no restart is left.
        KeyboardInterrupt, SystemExit: if this process is told to stop, once the ranks have ended.
        Exception: the first failing rank's own error; its cause is a `RankError` that says where, with the traceback.
    """
    if ranks < 1:
        raise ValueError(f"launch needs at least one rank, not {ranks}")
    check_switches()
    _adopt_slurm()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _join(fn, args, ranks, ProcessGroup(device, timeout_s, placement, slices, watched=True))
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"{ranks} ranks need {ranks} GPUs; this machine has {torch.cuda.device_count()}")
    check_hosts(placement, ranks, 1, slices)
    return fork(fn, args, ranks, device, timeout_s, max_restarts)


def agree(words: list[str]) -> list[str]:
    """Rank 0's words, on every rank that torchrun or srun started; without a launcher, one's own."""
    here = started()
    return launch(lambda: words, ranks=here.ranks)[0] if here is not None else words


@dataclass(frozen=True)
class Restart:
    """A start of the ranks that is not their first.

    Args:
        number: of restarts so far, this one included.
        reason: a sentence's first half: who was killed, and by what.
    """

    number: int
    reason: str


def restarted() -> Restart | None:
    """Which restart of the ranks this is, on each of them, that all call it; None on the first start."""
    counts = [0] * dist.get_world_size()
    # On several hosts each of torchrun's agents counts by itself.
    dist.all_gather_object(counts, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    number = max(counts)
    return Restart(number, killed() or "a rank failed") if number else None


def first_said(key: str, value: str) -> tuple[str, Restart | None]:
    """What rank 0 said under this key before the ranks were started again, and which restart this is.

    Ranks that torchrun starts again are new processes, and know nothing of those before. What was not said before, by
    a job of a sweep that is only now begun, is `value`, and no restart. Every rank calls it, and all get the same.
    """
    again = restarted()
    said: list[Any] = [value, None]
    if dist.get_rank() == 0:
        store = dist.PrefixStore("helix-said", launchers_store()[0])
        if again is not None and store.check([key]):
            said = [store.get(key).decode(), again]
        else:
            store.set(key, value)
    dist.broadcast_object_list(said)
    return said[0], said[1]


def _join(fn: Callable[..., T], args: tuple[Any, ...], ranks: int, group: ProcessGroup) -> list[T]:
    running = int(os.environ["WORLD_SIZE"])
    if running != ranks:
        raise ValueError(f"{ranks} ranks were asked for, and {running} are running")
    activity.enter(activity.START)  # of a sweep's second job, in a process that has had the first
    if own := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # in a folder of torchrun's for this rank
        activity.record_to(Path(own).with_name("activity"))
    with group:
        result = fn(*args)
        results: list[Any] = [None] * ranks
        dist.all_gather_object(results, result)
        return results


def _adopt_slurm() -> None:
    """Give a task that srun started the variables that torchrun would have set."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or os.environ.get("SLURM_NTASKS", "1") == "1":
        return
    env, here = os.environ, started()
    assert here is not None
    if "MASTER_ADDR" not in env:  # a step need not have all nodes of its job
        env["MASTER_ADDR"] = _first_node(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    # One port for all tasks of a step and, as a rule, not two steps' or two jobs' on one node.
    number = 101 * int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", "0"))
    env.setdefault("MASTER_PORT", str(15000 + number % 15000))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = env["SLURM_LOCALID"], str(here.local_ranks)
    env["GROUP_WORLD_SIZE"] = str(here.hosts)


def _first_node(nodes: str) -> str:
    """The first of SLURM's nodes, which has rank 0: "gpu1" of "gpu[1-4,7]"."""
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except FileNotFoundError:  # in a container, as a rule
        from lightning.fabric.plugins.environments import SLURMEnvironment

        return str(SLURMEnvironment.resolve_root_node_address(nodes))
