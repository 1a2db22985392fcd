"""Where figures come from: versions, machine, command line, commit, time."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = (
    "helix-attention", "torch", "lightning", "deepspeed", "transformers", "hydra-core", "wandb", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of what decides the figures; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "a CPU"


def machine() -> dict[str, Any]:
    """What decides how fast runs are, and nothing that names the machine."""
    import psutil  # not at every command's start

    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def command() -> str:
    """The command line of this process, ready to paste."""
    program = ["-m", "helix"] if Path(sys.argv[0]).name == "__main__.py" else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def git_commit() -> str | None:
    """The commit this package runs from, with `-dirty` if files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-dirty" if changed else "")


def now() -> str:
    """The present as ISO 8601 with its offset, for `started_at`."""
    return datetime.now(UTC).isoformat(timespec="seconds")
