"""Checkpoints when things go wrong: ranks killed in the middle, files altered, disks full."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch
from checkpointed import DENSE, build, check_loads, saved
from ranks import on_ranks

from helix.checkpoint import manifest, storage
from helix.checkpoint.save_and_load import BackgroundSaver, CheckpointError, CheckpointWarning, load, restore, save
from helix.partition.grid import Grid
from helix.ranks.launch import RankError

DAMAGES = ("truncated", "flipped", "missing", "manifest")


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(folder: Path, where: str, background: bool) -> None:
    model, optimizer = build(DENSE, Grid(2, 1))
    saver = BackgroundSaver() if background else None
    save(folder, model, [optimizer], {"step": 1}, step=1)
    if torch.distributed.get_rank() == (1 if where == "file" else 0):
        if where == "file":

            def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
                path.write_bytes(b"\0" * 100)
                _die()

            storage.save_file = half
        else:
            setattr(manifest, {"manifest": "write", "rename": "publish"}[where], _die)
    (saver.save if saver else save)(folder, model, [optimizer], {"step": 2}, step=2)
    if saver:
        saver.wait()


def _goes_on(folder: Path) -> None:
    model, optimizer = build(DENSE, Grid(1, 1))
    assert check_loads(folder, model, optimizer) == {"step": 1}
    save(folder, model, [optimizer], step=2)


@pytest.mark.parametrize(("where", "background"), [("file", True), ("manifest", False), ("rename", True)])
def test_killed_inside_a_save_leaves_the_checkpoint_before(tmp_path: Path, where: str, background: bool) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        on_ranks(2, _killed, tmp_path, where, background)
    assert (tmp_path / ".00002-step-2.partial").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn of: half a checkpoint has no checkpoint's name
        assert manifest.latest(tmp_path) == tmp_path / "00001-step-1"
    on_ranks(1, _goes_on, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001-step-1", "00002-step-2"]


def _until_killed(folder: Path, count: Path, seconds: float, background: bool) -> None:
    model, optimizer = build(DENSE, Grid(2, 1))
    save(folder, model, [optimizer])  # whoever is killed before has nothing to go back to
    if torch.distributed.get_rank() == 1:
        threading.Timer(seconds, _die).start()
    saver = BackgroundSaver() if background else None
    for step in range(1, 10_000):
        saved = saver.save(folder, model, [optimizer], step=step) if saver else save(folder, model, [optimizer])
        if saved is not None:
            count.write_text(saved.path.name)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_killed_at_random_moments(tmp_path: Path, background: bool) -> None:
    draw, count, folder = random.Random(int(background)), tmp_path / "count", tmp_path / "checkpoints"
    count.write_text("")
    for _ in range(3):
        with pytest.raises(RankError, match="SIGKILL"):
            on_ranks(2, _until_killed, folder, count, draw.uniform(0, 0.5), background)
        newest = manifest.latest(folder)
        assert newest is not None
        assert newest.name[:5] >= count.read_text()[:5]  # no save that had returned was lost


def _damage(folder: Path, how: str) -> Path:
    """Damage the newest of two checkpoints, and return the file that is to be named."""
    file = folder / "00002-step-2" / ("manifest.json" if how == "manifest" else "rank-00001.safetensors")
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[:-5]
    else:
        content[len(content) // 2] ^= 1
    file.unlink() if how == "missing" else file.write_bytes(content)
    return file


def _refused(folders: list[Path]) -> list[tuple[list[str], dict[str, object], str]]:
    """Of each folder: what was warned, what of the first checkpoint came back, and what is said once that is gone."""
    found = []
    for folder in folders:
        model, optimizer = build(DENSE, Grid(2, 1))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", CheckpointWarning)
            extra = check_loads(folder, model, optimizer)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder / "00001-step-1")
        torch.distributed.barrier()
        with pytest.raises(CheckpointError) as none_left:
            restore(folder, model)
        found.append(([str(each.message) for each in warned], extra, str(none_left.value)))
    return found


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    on_ranks(2, saved, tmp_path / "whole", DENSE, Grid(2, 1), 1, 2)
    folders = [tmp_path / how for how in DAMAGES]
    files = [_damage(shutil.copytree(tmp_path / "whole", folder), folder.name) for folder in folders]
    for file in files:
        with pytest.raises(CheckpointError, match=file.name):  # asked for by name: no other will do
            manifest.verify(file.parent)
    for rank, found in enumerate(on_ranks(2, _refused, folders)):
        for (warned, extra, none_left), file in zip(found, files, strict=True):
            assert extra == {"step": 1}
            assert len(warned) == (rank == 0)
            assert all(str(file) in each and "00001-step-1 is taken instead" in each for each in warned)
            assert none_left.startswith(f"none of the 1 checkpoints in {file.parent.parent} is whole; the newest: ")
            assert str(file) in none_left


def _fails_on_rank_1(folder: Path) -> str:
    model, optimizer = build(DENSE, Grid(2, 1))
    if torch.distributed.get_rank() == 1:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rank-00001.safetensors")

        storage.save_file = full
    with pytest.raises(CheckpointError) as caught:
        save(folder, model, [optimizer])
    with pytest.raises(CheckpointError, match="is no checkpoint, and holds none"):
        load(folder / "none", model)
    return str(caught.value)


def test_a_full_disk_is_one_sentence_on_every_rank(tmp_path: Path) -> None:
    for reason in on_ranks(2, _fails_on_rank_1, tmp_path):
        assert reason.endswith("failed on rank 1: rank-00001.safetensors: No space left on device")
    assert list(tmp_path.iterdir()) == []
