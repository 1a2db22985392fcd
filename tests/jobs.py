"""Several command lines of infer.py on the ranks that torchrun or srun started, so that they share one start.

    torchrun .. tests/jobs.py FOLDER '[["parallel=helix_4x4", ..], ..]'

Each is a command of its own, in the folder FOLDER/0, FOLDER/1 and so on. What each host sent meanwhile, all headers
included, is added to FOLDER/sent.HOST.jsonl, a line each.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sent() -> dict[str, int]:
    """Bytes and frames that left this host on eth0 so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            numbers = [int(each) for each in counts.split()]
            return {"frame_bytes": numbers[8], "frames": numbers[9]}
    raise RuntimeError("this host has no interface eth0")


def main(folder: Path, jobs: list[list[str]]) -> None:
    sys.path.insert(0, str(ROOT))
    for number, words in enumerate(jobs):
        before = sent()
        sys.argv = [str(ROOT / "infer.py"), *words, f"hydra.run.dir={folder / str(number)}"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        if os.environ.get("LOCAL_RANK") == "0":
            change = {key: value - before[key] for key, value in sent().items()}
            with (folder / f"sent.{socket.gethostname()}.jsonl").open("a") as file:
                file.write(json.dumps(change) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
