"""Where a folder of runs comes from, for runs.sh: python notebooks/provenance.py FOLDER writes provenance.json."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from helix.study.provenance import git_commit, machine, now, versions


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
