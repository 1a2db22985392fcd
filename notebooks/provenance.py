"""Where a folder of runs comes from, for runs.sh: python notebooks/provenance.py FOLDER writes provenance.json."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
from pathlib import Path

import psutil

from helix.study.provenance import git_commit, now, versions


def machine() -> dict[str, object]:
    """What decides how fast runs are, and nothing that names the machine."""
    told = Path("/proc/cpuinfo")
    models = (
        [line for line in told.read_text().splitlines() if line.startswith("model name")]
        if told.exists()
        else []
    )
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def main(folder: Path) -> None:
    """Take the commands that runs.sh noted, and say where and when they ran."""
    noted = folder / "commands.tsv"
    with noted.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    content = {
        "made_at": now(),
        "git_commit": git_commit(),
        "machine": machine(),
        "versions": versions(),
        "runs": [
            {"folder": place, "seconds": float(seconds), "command": words}
            for place, seconds, words in rows
        ],
    }
    (folder / "provenance.json").write_text(json.dumps(content, indent=2) + "\n")
    noted.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
