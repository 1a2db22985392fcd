"""Ranks that were started again: where they go on, from what this training has saved whole, and what is left."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from helix.checkpoint.content import About, Manifest, Sum
from helix.checkpoint.manifest import CheckpointWarning, write
from helix.config.schema import LoggerConfig
from helix.config.train_schema import TrainConfig
from helix.flight import ring
from helix.ranks.launch import RankError, launch
from helix.study.left import left_in
from helix.study.tracking import Tracker
from helix.training import run as training
from helix.training.resuming import Beginning, begin


def _begun_again(run_dir: Path, own: dict[str, dict[str, Sum]]) -> Path | None:
    warnings.simplefilter("ignore", CheckpointWarning)
    beginning = begin(TrainConfig(ckpt="elsewhere"), run_dir)
    if beginning.restart is not None:
        return beginning.source
    assert beginning.source == Path("elsewhere")
    if dist.get_rank() == 1:
        for folder, content in own.items():
            (beginning.checkpoints / folder).mkdir()
            write(Manifest({}, content, About()), beginning.checkpoints / folder)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return None


MISSING = {"rank-00000.safetensors": Sum("", 1)}


@pytest.mark.parametrize(
    ("own", "goes_on_from"),
    [
        ({}, None),
        ({"00008-step-2": {}, "00009-step-4": {}, "00010-step-6": MISSING}, "00009-step-4"),
        ({"00008-step-2": MISSING}, None),
    ],
    ids=["none", "two whole ones", "a damaged one"],
)
def test_what_an_earlier_training_left_in_the_folder_is_not_gone_on_from(
    tmp_path: Path, own: dict[str, dict[str, Sum]], goes_on_from: str | None
) -> None:
    """Its checkpoint is of step 40. Until this training has a whole one of its own, `ckpt` says where it begins."""
    folder = tmp_path / "checkpoints"
    (folder / "00007-step-40").mkdir(parents=True)
    write(Manifest({}, {}, About(40)), folder / "00007-step-40")
    found = launch(_begun_again, tmp_path, own, ranks=2, timeout_s=20, max_restarts=1)
    assert found == [folder / goes_on_from if goes_on_from else Path("elsewhere")] * 2


def _dies(settings: TrainConfig, device: str, text: bytes, tracker: Tracker, beginning: Beginning) -> Any:
    """In place of a training: rank 1 is killed in each start, and leaves in the first what it does if others were."""
    start = 0 if beginning.restart is None else beginning.restart.number
    for step in (1 + start, 2 + start):
        tracker.log({"loss": 10 * start + step}, step=step)
    dist.barrier()
    if dist.get_rank() == 1:
        if start == 0:
            assert ring.write() is not None
            (beginning.run_dir / "failed.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_of_several_starts_the_whole_history_is_left_and_the_last_ones_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train", _dies)
    settings = TrainConfig(logger=LoggerConfig(kind="none"))
    with pytest.raises(RankError):
        launch(training._rank, settings, tmp_path, "cpu", "", b"", ranks=2, timeout_s=20, max_restarts=1)
    assert not (tmp_path / "flight" / "rank-1.json").exists()
    assert not (tmp_path / "failed.json").exists()  # which the command would write now
    (tmp_path / "failed.json").write_text("{}")
    history = left_in(tmp_path, []).history
    assert (history["_step"], history["loss"]) == ([1, 2, 3], [1, 12, 13])
