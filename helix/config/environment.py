"""What this machine and whoever started this process provide, asked without importing torch."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from helix.config.schema import ConfigError

DEBUG_LIMIT_S = 10  # of a rank that comes to no collective, in debug mode


@dataclass(frozen=True)
class Started:
    """This process as one of several that a launcher started.

    Args:
        by: the launcher's name.
        ranks: processes of the whole job.
        rank: this one, counted from 0.
        local_ranks: processes on this host.
        hosts: of the whole job, as the launcher counts them.
    """

    by: str
    ranks: int
    rank: int
    local_ranks: int
    hosts: int = 1


def local_ranks(ranks: int) -> int:
    """How many of a job's ranks this host has: as many as its launcher started here, or all, which are forked.

    Raises:
        ConfigError: if the launcher's variables are not numbers.
    """
    launcher = started()
    return launcher.local_ranks if launcher is not None else ranks


def started() -> Started | None:
    """How torchrun or srun started this process, or None if it was started by itself.

    Raises:
        ConfigError: if the launcher's variables are not numbers.
    """
    slurm = "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        ranks = _number("WORLD_SIZE")
        local = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else ranks
        hosts = _number("GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in os.environ else -(-ranks // max(1, local))
        # A task of srun's has these too, once its ranks have met.
        by = "SLURM" if slurm and "TORCHELASTIC_RUN_ID" not in os.environ else "torchrun"
        return Started(by, ranks, _number("RANK"), local, max(1, hosts))
    # One task is a plain batch script, whose ranks are forked as anywhere else.
    if slurm:
        ranks, hosts = _number("SLURM_NTASKS"), max(1, _number("SLURM_NNODES", "1"))
        tasks = os.environ.get("SLURM_GTIDS")  # of this node, by their numbers: "4,5,6"
        local = len(tasks.split(",")) if tasks else -(-ranks // hosts)
        return Started("SLURM", ranks, _number("SLURM_PROCID"), local, hosts)
    return None


def speaks() -> bool:
    """Whether this process is the one of its job that talks to the user."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def tell_launcher(reason: str) -> None:
    """Leave the sentence with which this process ends to torchrun, whose report would otherwise show a link instead.

    In the form of torch.distributed.elastic.multiprocessing.errors, whose own writer is for exceptions with a trace.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or Path(path).is_char_device():  # not wanted
        return
    content = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
    draft = Path(path).with_suffix(".draft")
    with suppress(OSError):  # half a file, on a full disk, would end torchrun with a traceback
        draft.write_text(json.dumps(content))
        draft.replace(path)


def gpus() -> int:
    """NVIDIA GPUs that this process may use; 0 without a driver."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(present, len(named))


def dealt_out() -> bool:
    """Whether SLURM shows each of its tasks a GPU of its own alone, as `--gpus-per-task` asks."""
    asked = "SLURM_GPUS_PER_TASK" in os.environ or "gres/gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    return asked and (launcher := started()) is not None and launcher.by == "SLURM"


def kernel_namespace() -> str:
    """What only processes have in common that can open each other's memory: the kernel's start, their namespace.

    Empty where there is no such thing, as outside Linux.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def most_ranks() -> int:
    """How many ranks are forked here at most: more wait for each other longer than they compute.

    Raises:
        ConfigError: if HELIX_MAX_RANKS, which overrules it, is not a number.
    """
    if "HELIX_MAX_RANKS" in os.environ:
        return _number("HELIX_MAX_RANKS")
    return max(16, 8 * cores(), gpus())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def resolve_device(device: str, local_ranks: int) -> str:
    """`auto` as what it means here: CUDA if every rank of this host has a GPU of its own, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if gpus() >= local_ranks else "cpu"


def memory_bytes() -> int:
    """All memory that processes of this host can have, a container's limit included."""
    whole = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:  # no version-2 control groups here
        return whole
    return whole if limit == "max" else min(whole, int(limit))


def free_memory_bytes() -> int:
    """Memory that new processes can have on this host, a container's limit included."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no version-2 control groups here
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def free_gpu_memory_bytes() -> int | None:
    """Free memory of the fullest GPU, or None if the driver's tool does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True).stdout
        return min(int(line) for line in answer.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def debug_limit_s() -> float | None:
    """How long debug mode waits for a rank that comes to no collective; None where it is not asked for.

    Raises:
        ConfigError: if HELIX_DEBUG or HELIX_DEBUG_LIMIT_S is nothing that it may be.
    """
    asked = _switched("HELIX_DEBUG", False)
    limit = _number("HELIX_DEBUG_LIMIT_S") if "HELIX_DEBUG_LIMIT_S" in os.environ else DEBUG_LIMIT_S
    if limit < 1:
        raise ConfigError(f"the environment variable HELIX_DEBUG_LIMIT_S must be at least 1 second, not {limit}")
    return float(limit) if asked else None


def shares_memory() -> bool:
    """Whether ranks of one host may exchange small tensors through memory; HELIX_SHARED_MEMORY=0 leaves all to gloo.

    Raises:
        ConfigError: if it is nothing that it may be.
    """
    return _switched("HELIX_SHARED_MEMORY", True)


def check_switches() -> None:
    """Check the variables that turn parts of Helix on or off, which every rank would refuse by itself.

    Raises:
        ConfigError: if one is nothing that it may be.
    """
    debug_limit_s()
    shares_memory()


def _switched(variable: str, default: bool) -> bool:
    asked = os.environ.get(variable, "")
    if asked not in ("0", "1", ""):
        raise ConfigError(f"the environment variable {variable} must be 0 or 1, not {asked!r}")
    return asked == "1" if asked else default


def _number(variable: str, default: str = "") -> int:
    text = os.environ.get(variable, default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {variable} must be a whole number, not {text!r}") from None
