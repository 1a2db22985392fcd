"""Commands on two hosts, started by torchrun on each: the same answers, and on the wire what is predicted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hosts import ROOT, hosts, why_not
from torchruns import both, jobs, read, torchrun

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(why_not()), reason=why_not())]
TINY = ["model=tiny", "logger=none", "workload.batch_size=8", "workload.seq_len=32", "workload.runs=2"]


def forked(folder: Path, *words: str) -> dict[str, Any]:
    """The report of one host's forked ranks."""
    command = [sys.executable, "infer.py", *words, f"hydra.run.dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=100, capture_output=True)
    return read(folder)


@pytest.mark.timeout(300)
def test_two_hosts_compute_what_one_does_and_send_what_is_predicted(tmp_path: Path) -> None:
    """All jobs in one start of torchrun, whose 16 interpreters take most of the time."""
    method = ["parallel=helix_4x4", *TINY]
    more = 10
    lines = [
        [*method, f"parallel.placement={placement}", f"workload.iterations={steps}"]
        for placement in ("slices_inside", "slices_across")
        for steps in (2, 2 + more // 2)
    ]
    carried = jobs(tmp_path / "two", 8, lines)
    one = forked(tmp_path / "one", *method)
    reports = [read(tmp_path / "two" / str(number)) for number in range(4)]
    bits = {report["accuracy"]["output_sha256"] for report in reports}
    assert bits == {one["accuracy"]["output_sha256"]}
    crossed = []
    for few, many in ((0, 1), (2, 3)):
        between = reports[many]["between_hosts"]
        assert between["executed"] == between["predicted"]
        for host, to in between["pairs"].items():
            # The start, the store and what is gathered for the report are in both.
            a_step = (carried[many][host] - carried[few][host]) / more
            assert a_step == pytest.approx(sum(to.values()), rel=0.02)
        crossed.append(sum(between["executed"].values()))
    inside, across = crossed
    assert reports[0]["between_hosts"]["placements"] == {"slices_inside": inside, "slices_across": across}
    assert inside < across


@pytest.mark.timeout(300)
def test_a_training_goes_on_after_a_host_lost_a_rank(tmp_path: Path) -> None:
    """On hosts whose own name is a loopback address, as Debian installs it: gloo is told the interface."""
    tiny = ["model=tiny", "model.layers=1", "logger=none", "data.batch_size=4", "data.seq_len=16"]
    limits = [
        "trainer.max_steps=12",
        "trainer.save_every_n_steps=2",
        "trainer.validate_every_n_steps=12",
        "optimizer.warmup_steps=2",
    ]
    words = ["train.py", "parallel=helix_2x2", *tiny, *limits]
    script = tmp_path / "train.py"
    script.write_text(KILLING.format(root=str(ROOT), mark=str(tmp_path / "killed")))
    with hosts(2, rate="1gbit", own_name="127.0.1.1") as two:
        command = [script, *words[1:], f"hydra.run.dir={tmp_path / 'run'}"]
        ended = both([torchrun(host, 2, *command, restarts=1) for host in two])
    assert (tmp_path / "killed").exists()
    assert [code for code, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
    report = read(tmp_path / "run", "train_report.json")
    assert report["hosts"]["ranks"] == {"host1": [0, 1], "host2": [2, 3]}
    undisturbed = tmp_path / "one"
    command = [sys.executable, *words, f"hydra.run.dir={undisturbed}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=90, capture_output=True)
    assert report["losses"] == read(undisturbed, "train_report.json")["losses"]


@pytest.mark.timeout(300)
def test_an_interface_that_a_host_lacks_is_named(tmp_path: Path) -> None:
    command = ["infer.py", "parallel=helix_2x2", *TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    with hosts(2) as two:
        ended = both([torchrun(host, 2, *command, GLOO_SOCKET_IFNAME="ib0") for host in two])
    assert all(code == 1 for code, _, _ in ended)  # torchrun's own
    said = ended[0][2]
    assert said.count("infer.py: error: GLOO_SOCKET_IFNAME=ib0 is no network interface of host1; it has eth0, lo") == 1
    assert not (tmp_path / "run" / "report.json").exists()


# train.py, one of whose ranks on the second host is killed once there is a checkpoint, but only once.
KILLING = """
import os, pathlib, runpy, sys, threading, time
mark = pathlib.Path({mark!r})
folder = next(each for each in sys.argv if each.startswith("hydra.run.dir=")).partition("=")[2]
def kill():
    while not list(pathlib.Path(folder, "checkpoints").glob("*/manifest.json")) and not mark.exists():
        time.sleep(0.01)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
if os.environ["RANK"] == "3":
    threading.Thread(target=kill, daemon=True).start()
sys.path.insert(0, {root!r})
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
