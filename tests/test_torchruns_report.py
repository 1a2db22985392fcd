"""What torchrun reports of a rank that ended with a sentence is that sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from helix.command.job import Stop, stop
from helix.config.environment import tell_launcher

FILE = "TORCHELASTIC_ERROR_FILE"


def test_torch_reads_what_a_command_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "error.json"))
    with pytest.raises(Stop):
        stop("n=3 does not\ndivide 4", code=2)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert "traceback : n=3 does not divide 4\n" in ChildFailedError("infer.py", {0: failure}).format_msg()
    assert os.listdir(tmp_path) == ["error.json"]


@pytest.mark.parametrize("nowhere", ["", os.devnull, "{}/no/such/folder/error.json"])
def test_a_launcher_that_wants_no_file_gets_none(
    nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FILE, nowhere.format(tmp_path))
    monkeypatch.chdir(tmp_path)
    tell_launcher("a sentence")
    assert not os.listdir(tmp_path)
    assert Path(os.devnull).is_char_device()
