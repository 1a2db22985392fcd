"""Launching from a process of its own, and as one of the ranks that torchrun or SLURM started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helix.config.environment import started
from helix.ranks.launch import launch

ROOT = Path(__file__).resolve().parents[1]


def never() -> None:
    raise AssertionError("a launch that is refused runs nothing")


@pytest.mark.parametrize("ranks", [0, -2])
def test_fewer_than_one_rank_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"launch needs at least one rank, not {ranks}"):
        launch(never, ranks=ranks)


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="4096 ranks need 4096 GPUs; this machine has"):
        launch(never, ranks=4096, device="cuda")


def test_a_different_number_of_running_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (here := started()) is not None
    assert here.ranks == 2
    with pytest.raises(ValueError, match="16 ranks were asked for, and 2 are running"):
        launch(never, ranks=16)


def test_slurm_tasks_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun's variables become torchrun's, and the ranks are taken as given."""
    slurm = {"PROCID": "1", "NTASKS": "4", "LOCALID": "1", "JOB_ID": "7", "NNODES": "2", "GTIDS": "0,1"}
    for key, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(key, "")  # so that monkeypatch takes them away again
        monkeypatch.delenv(key)
    assert (here := started()) is not None
    assert here.ranks == 4
    with pytest.raises(ValueError, match="3 ranks were asked for, and 4 are running"):
        launch(never, ranks=3)
    adopted = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert adopted == {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for key in (*adopted, "MASTER_PORT"):
        os.environ.pop(key)


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    path.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom helix import launch\n{body}")
    return path


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_rank_outlives_its_launcher(tmp_path: Path, number: int) -> None:
    # One write, so that the ranks' lines stay whole.
    body = "def stay():\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(60)\nlaunch(stay, ranks=3)"
    # Its standard error goes to a file: a pipe that nobody reads could hold it up.
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, script(tmp_path, body)], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout
    pids = [int(process.stdout.readline()) for _ in range(3)]
    assert all(map(alive, pids))
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=10) != 0
    while any(map(alive, pids)) and time.monotonic() - start < 10:
        time.sleep(0.05)
    process.stdout.close()
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_under_torchrun_the_ranks_are_taken_as_given(tmp_path: Path) -> None:
    body = (
        "import torch.distributed as dist\n"
        "def ids(word):\n    return (word, dist.get_rank(), os.getpid())\n"
        "found = launch(ids, 'hello', ranks=2)\n"
        "assert found[int(os.environ['RANK'])][2] == os.getpid()  # no fork\n"
        "say = lambda text: os.write(1, (text + '\\n').encode())  # one write, so that lines stay whole\n"
        "say(' '.join(f'{word}{rank}' for word, rank, _ in found))\n"
        "try:\n    launch(ids, 'hello', ranks=3)\n"
        "except ValueError as error:\n    say(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script(tmp_path, body)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        *["3 ranks were asked for, and 2 are running"] * 2,
        *["hello0 hello1"] * 2,
    ]
