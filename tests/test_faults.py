"""How jobs end whose rank is killed, stopped, cut off or starved: some of the matrix; all of it with `-m faults`."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from fault_jobs import FORKED, HOSTS, PHASES, Cell
from faults import Ending, cells, run
from hosts import why_not

from helix.flight import activity
from helix.ranks.failure import RankError, exhausted
from helix.ranks.process_group import _agree
from helix.study.left import left_in


def test_forked_ranks(tmp_path: Path) -> None:
    """Of the matrix, what is quick."""
    some = [Cell("measurement", "rank 0 killed"), Cell("checkpoint", "killed")]
    endings = run(some, tmp_path, at_once=2)
    assert [ending.fault for ending in endings] == [""] * len(some)
    assert endings[0].records > 0
    assert endings[0].wandb == "failed"
    assert "rank 0 (host " in endings[0].said[0]


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_the_matrix(tmp_path: Path) -> None:
    assert_as_asked([cell for cell in cells(PHASES, FORKED) if not cell.hosts], tmp_path, at_once=4)


@pytest.mark.faults
@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.timeout(600)
def test_two_hosts(tmp_path: Path) -> None:
    assert_as_asked([cell for cell in cells(PHASES, HOSTS) if cell.hosts], tmp_path, at_once=2)


def assert_as_asked(some: list[Cell], folder: Path, at_once: int) -> None:
    wrong = [f"{each.cell}: {each.fault}; {each.said}" for each in run(some, folder, at_once, told=say) if each.fault]
    assert some
    assert not wrong, "\n".join(wrong)


def say(each: Ending) -> None:
    print(each.cell, f"{each.seconds} s", each.fault or "as it should")


def test_a_phase_is_said_outside_and_left_as_it_was_by_an_error(tmp_path: Path) -> None:
    record = tmp_path / "activity"
    try:
        activity.record_to(record)
        assert activity.read(record) == (os.getpid(), "start")
        with pytest.raises(LookupError), activity.activity("load"):
            raise LookupError
        assert activity.read(record) == (os.getpid(), "load")
        with activity.activity("save"):
            assert activity.read(record) == (os.getpid(), "save")
        assert activity.current() == "load"
    finally:
        activity.record_to(Path(os.devnull) / "nowhere")  # what cannot be written ends no rank
    assert activity.read(tmp_path / "none") == (0, "start")


def test_ranks_that_never_come_are_named() -> None:
    store, short = dist.HashStore(), timedelta(seconds=0.4)

    def one(rank: int) -> str:
        with pytest.raises(TimeoutError) as caught:
            _agree(store, rank, 4, short)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(one, (0, 2))
    assert "ranks 1, 3 of 4 have not come within 0 s of rank 0" in first
    assert "rank 2 waited 0 s for rank 0 and the other ranks to start" in other


def test_errors_of_ranks_survive_pickle_and_name_all() -> None:
    error = pickle.loads(pickle.dumps(RankError(3, "vm", "measurement, run 2 of 5", "was killed by SIGKILL")))
    assert str(error) == (
        "rank 3 (host vm) was killed by SIGKILL during measurement, run 2 of 5; the other ranks were stopped"
    )
    assert exhausted(MemoryError())
    assert exhausted(OSError(12, os.strerror(12)))
    assert exhausted(RuntimeError(f"can't allocate: Error code 12 ({os.strerror(12)})"))
    assert not exhausted(RuntimeError("another"))


def test_what_is_left_of_a_failed_job(tmp_path: Path) -> None:
    faults: list[str] = []
    assert not left_in(tmp_path, faults).failed
    (tmp_path / "failed.json").write_text(json.dumps({"reason": "so", "traceback": "long"}))
    (tmp_path / "history.jsonl").write_text(
        '{"_step": 0, "loss": 1.5}\n{"_st{"_step": 1}\n{"_step": 1, "loss": 1.25}\n'
    )
    left = left_in(tmp_path, faults)
    assert dict(left.failed) == {"reason": "so"}
    assert left.history["loss"] == [1.5, 1.25]
    (tmp_path / "failed.json").write_text("{")
    assert not left_in(tmp_path, faults).failed
    assert len(faults) == 1
