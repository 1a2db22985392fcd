"""Where ranks that were started again go on: from what this training has saved, and is whole."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

from helix.checkpoint.content import About, Manifest, Sum
from helix.checkpoint.manifest import CheckpointWarning, write
from helix.config.train_schema import TrainConfig
from helix.ranks.launch import launch
from helix.training.resuming import begin


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
