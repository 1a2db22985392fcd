"""Ranks that disagree are named within seconds: debug mode, the flight record, what a launch agrees on first."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mutations_stuck import ODD, STUCK
from ranks import on_ranks

import helix.comm.debug  # noqa: F401  the ranks share the import
from helix import Grid, Mesh
from helix.__main__ import main
from helix.comm import transport
from helix.comm.debug import checked
from helix.comm.observe import observe
from helix.comm.record import record
from helix.config.check import check_started
from helix.config.schema import ConfigError
from helix.flight import ring
from helix.flight.checking import Disagreement
from helix.flight.parting import ranks_in_words
from helix.flight.reading import Noted, Record, read, verdict
from helix.ranks.agreement import agree_on, compare
from helix.ranks.launch import launch


def _disagree(folder: Path) -> list[tuple[str, float]]:
    """What this rank raises of each, and after how long; what it has come to by then, in the folder."""
    mesh, found = Mesh(Grid(2, 2)), []
    with checked():  # what is slow the first time is no rank's fault
        dist.barrier()
    for stuck in STUCK:
        began, said = time.monotonic(), ""
        try:
            with checked(1):
                stuck.work(mesh, dist.get_rank() == ODD)
        except (Disagreement, ValueError) as error:
            said = str(error)
        found.append((said, time.monotonic() - began))
        dist.barrier()  # nothing that was refused has begun, so the groups are as they were
    ring.write(folder)
    return found


def test_ranks_that_disagree_are_named_on_every_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # capfd, not capsys: torch elastic enables the fault handler on a rank's stderr, which must be a file
    found = on_ranks(4, _disagree, tmp_path, timeout_s=60)
    for number, stuck in enumerate(STUCK):
        said = [each[number][0] for each in found]
        waited = [rank for rank in range(4) if rank != ODD or stuck.waits]
        texts = {said[rank] for rank in waited} - {""}
        assert len(texts) == 1, f"{stuck.name}: {said}"
        assert re.fullmatch(stuck.said, texts.pop()), f"{stuck.name}: {said}"
        assert max(each[number][1] for each in found) < 10, stuck.name
    main(["flight", str(tmp_path)])
    out = " ".join(capfd.readouterr().out.split())
    assert (
        "rank 3 came to collective 1 of the default_pg axis (ranks 0-3) with broadcast/default_pg [4] float32" in out
    )


def _right(folder: Path) -> list[str]:
    """Sums that are right, a record, and an answer that rank 1 alone waits for."""
    mesh = Mesh(Grid(2, 1))
    with checked():
        with checked():  # the same checks, and one count
            for _ in range(3):
                torch.testing.assert_close(transport.all_reduce(torch.ones(2), mesh.slice, "x"), torch.full((2,), 2.0))
        with observe({}), record() if dist.get_rank() else nullcontext():  # whoever listens, it is one collective
            dist.all_reduce(torch.ones(1))
        with checked(), observe({}):
            dist.barrier()
    said = ring.last()
    if dist.get_rank() == 1:
        ring.come("all_reduce/late", "slice", mesh.slice.group, 8, (2,), torch.float32)
    ring.write(folder, "asked")
    refused = ""
    try:
        compare({"precision": "fp32", "seed": "1" if dist.get_rank() else "0"}, 5)
    except ConfigError as error:
        refused = str(error)
    agree_on({"seed": dist.get_rank()}, folder)  # forked ranks have nothing to compare
    return [said, refused, compare({"precision": "fp32"}, 5, f"of rank {dist.get_rank()}")]


def test_right_ranks_pass_and_what_they_did_is_kept(tmp_path: Path) -> None:
    (last, first_refused, folder), (_, refused, other_folder) = on_ranks(2, _right, tmp_path)
    assert re.fullmatch(r"barrier/\S+, collective 5 of .* \(ranks 0-1\), enqueued \S+ s ago", last)
    assert first_refused == refused
    assert folder == other_folder == "of rank 0"
    assert re.fullmatch(
        r"rank 1 \(host \S+\) was not started as rank 0 \(host \S+\): seed is 1 there, and 0 on rank 0; .*", refused
    )
    records = read(tmp_path)
    assert [entry.number for entry in records[0].entries] == [1, 2, 3, 4, 5]
    assert verdict(records) == (
        "rank 1 waited in collective 6 of the slice axis (ranks 0-1), all_reduce/late [2] float32, to which rank 0 "
        "had not come; rank 0 enqueued " + records[0].entries[-1].place + ", " + records[0].entries[-1].what
    )
    (tmp_path / "flight" / "rank-0.json").unlink()
    said = "rank 1 waited in collective 6 of the slice axis (ranks 0-1), all_reduce/late [2] float32"
    assert verdict(read(tmp_path)) == f"{said}; rank 0 left no record"
    ring.remove(tmp_path)
    with pytest.raises(ConfigError, match="holds no flight record"):
        read(tmp_path)


def _noted(number: int, what: str = "all_reduce/x [2] float32", ended: bool = False, axis: str = "slice") -> Noted:
    enqueued = None if ended else 2.0
    return Noted(axis, (0, 1), axis, number, what.split()[0], what, "load", 1.0, 3.0 if ended else None, enqueued)


def _records(*entries: list[Noted]) -> list[Record]:
    return [Record(rank, 2, "a", "load", "", tuple(each)) for rank, each in enumerate(entries)]


def test_what_a_stream_has_taken_over_is_not_said_to_have_ended() -> None:
    assert verdict(_records([_noted(1), _noted(2)], [_noted(1)])) == (
        "rank 0 enqueued collective 2 of the slice axis (ranks 0-1), all_reduce/x [2] float32, and rank 1 no more "
        "than 1 there; which of them ended, no record says"
    )
    assert verdict(_records([_noted(1)], [_noted(1)])).endswith("whether what was enqueued has ended, no record says")
    assert verdict(_records([_noted(1, ended=True)], [_noted(1, ended=True)])).startswith("the records agree")


def test_where_ranks_part_first_is_known_by_their_own_order() -> None:
    """Rank 1's clock is of another host."""
    first, second = _noted(7, "all_gather/y [2] float32"), _noted(1, "all_gather/z [3] float32", axis="head")
    late = replace(_noted(7), came_at=9.0), replace(_noted(1, axis="head"), came_at=10.0)
    found = verdict(_records([replace(first, came_at=6.0), replace(second, came_at=5.0)], list(late)))
    assert "collective 7 of the slice axis" in found


def _one_leaves(folder: Path) -> None:
    mesh = Mesh(Grid(2, 1))
    ring.keep_in(folder)
    if dist.get_rank() == 0:
        transport.all_reduce(torch.ones(2), mesh.slice, "x")


def test_the_environment_asks_for_debug_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIX_DEBUG", "1")
    with pytest.raises(Disagreement, match=r"rank 1 has returned .*, and does not come to collective 1 of the slice"):
        on_ranks(2, _one_leaves, tmp_path)
    assert "Disagreement" in json.loads((tmp_path / "flight" / "rank-0.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("HELIX_DEBUG", "yes", "must be 0 or 1"), ("HELIX_DEBUG_LIMIT_S", "0", "at least 1 second")],
)
def test_a_wrong_environment_is_refused(name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    for refused in (lambda: check_started(1), lambda: launch(os.getpid, ranks=1)):  # a command's check, and a call's
        with pytest.raises(ConfigError, match=said):
            refused()


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no flight record"):
        read(tmp_path)
    (tmp_path / "rank-0.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no flight record"):
        read(tmp_path)


def test_ranks_in_words() -> None:
    assert [ranks_in_words(ranks) for ranks in ([3], [2, 0, 1, 5], [0, 2, 4])] == [
        "rank 3", "ranks 0-2 and 5", "ranks 0, 2 and 4",
    ]  # fmt: skip
