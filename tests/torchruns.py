"""torchrun on two hosts, and what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosts import Host, Process, Sent, hosts


def torchrun(host: Host, ranks: int, *command: str | Path, restarts: int = 0, **env: str) -> Process:
    """torchrun on one of two hosts, which meet on the first."""
    words = ["--nnodes=2", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--rdzv-id=test"]
    where = ["--rdzv-backend=c10d", "--rdzv-endpoint=host1:29400"]
    started = [sys.executable, "-m", "torch.distributed.run", *words, *where, *command]
    return host.popen(started, env={"OMP_NUM_THREADS": "1", **env})


def both(ends: Sequence[Process], timeout: float = 200) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each of them."""
    deadline = time.monotonic() + timeout
    try:
        said = [end.communicate(timeout=deadline - time.monotonic()) for end in ends]
    except subprocess.TimeoutExpired:
        for end in ends:
            end.kill()
        raise AssertionError([end.communicate() for end in ends]) from None
    return [(end.returncode, *each) for end, each in zip(ends, said, strict=True)]


def read(folder: Path, name: str = "report.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def jobs(
    folder: Path, ranks: int, lines: list[list[str]], rate: str = "1gbit", timeout: float = 200
) -> list[dict[str, int]]:
    """Run lines of infer.py on two hosts of so many ranks each; what was sent over the link in each, by host."""
    folder.mkdir()
    with hosts(2, rate=rate) as two:
        ended = both([torchrun(host, ranks, "tests/jobs.py", folder, json.dumps(lines)) for host in two], timeout)
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    assert not ended[1][1].strip(), "only rank 0 speaks"
    counts = {}
    for host in two:
        text = (folder / f"sent.{host.name}.jsonl").read_text()
        counts[host.name] = [Sent(**json.loads(line)).payload_bytes for line in text.splitlines()]
    return [{name: each[number] for name, each in counts.items()} for number in range(len(lines))]
