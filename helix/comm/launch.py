"""Running a function on ranks: forked on this machine, or the ones that torchrun or SLURM started.

Forking shares one import of torch among all ranks (16 ranks up in about a second; 16 interpreters on two
cores need 44). The parent must not have started torch's thread pool, which does not survive a fork.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from helix.comm.fork import RankError, fork, killed
from helix.comm.process_group import ProcessGroup, launchers_store
from helix.config.environment import started

__all__ = ["RankError", "Restart", "agree", "launch", "restarted"]

T = TypeVar("T")


def launch(
    fn: Callable[..., T], *args: Any, ranks: int, device: str = "cpu", timeout_s: float = 600, max_restarts: int = 0
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

    Raises:
        ValueError: if ranks is below 1, differs from the ranks that are running, or exceeds the GPUs.
        RankError: if a rank was killed, and no restart is left.
        KeyboardInterrupt, SystemExit: if this process is told to stop, once the ranks have ended.
        Exception: the first failing rank's own error, with its traceback as the cause.
    """
    if ranks < 1:
        raise ValueError(f"launch needs at least one rank, not {ranks}")
    _adopt_slurm()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _join(fn, args, ranks, device, timeout_s)
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"{ranks} ranks need {ranks} GPUs; this machine has {torch.cuda.device_count()}")
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


def _join(fn: Callable[..., T], args: tuple[Any, ...], ranks: int, device: str, timeout_s: float) -> list[T]:
    running = int(os.environ["WORLD_SIZE"])
    if running != ranks:
        raise ValueError(f"{ranks} ranks were asked for, and {running} are running")
    with ProcessGroup(device, timeout_s):
        result = fn(*args)
        results: list[Any] = [None] * ranks
        dist.all_gather_object(results, result)
        return results


def _adopt_slurm() -> None:
    """Give a task that srun started the variables that torchrun would have set."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or os.environ.get("SLURM_NTASKS", "1") == "1":
        return
    env = os.environ
    if "MASTER_ADDR" not in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
        env["MASTER_ADDR"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    # One port for all tasks of a job and, as a rule, not two jobs' on one node.
    env.setdefault("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 40000))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = env.get("SLURM_NTASKS_PER_NODE", env["SLURM_NTASKS"])
