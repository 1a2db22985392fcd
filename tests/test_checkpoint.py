"""Checkpoints on any grid: parameters and optimizer state come back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpointed import DENSE, MOE, assert_same, build, change, check_loads, held, optimizer_of, saved
from ranks import on_ranks
from torch import nn

from helix.attention import HelixAttention
from helix.checkpoint.manifest import latest, verify
from helix.checkpoint.save_and_load import BackgroundSaver, CheckpointError, load, save
from helix.comm.mesh import Mesh
from helix.models.plain import PlainTransformer
from helix.models.transformer import Transformer
from helix.parallel.shard_data import shard_over_data
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

pytestmark = pytest.mark.usefixtures("deepspeed")


def _from_4x4(folder: Path, shape: TransformerShape) -> None:
    saved(folder, shape, Grid(4, 4), 2)
    # Each grid with one of the models: their attention, embedding and head are cut alike.
    of_moe = ((Grid(2, 2), 2), (Grid(1, 4), 1))
    for grid, ep_size in of_moe if shape.experts else ((Grid(2, 8), None), (Grid(4, 1), None)):
        extra = check_loads(folder, *build(shape, grid, 16 // grid.ranks, ep_size))
        assert extra == {"step": 2}


def _alone(folder: Path, shape: TransformerShape) -> None:
    check_loads(folder, *build(shape, Grid(1, 1)))
    model = PlainTransformer(shape)
    model.init_weights(0)
    check_loads(folder, model, optimizer_of(model))


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_what_16_ranks_saved_loads_on_every_grid_and_on_a_single_device(
    tmp_path: Path, shape: TransformerShape
) -> None:
    on_ranks(16, _from_4x4, tmp_path, shape, timeout_s=60)
    on_ranks(1, _alone, tmp_path, shape)
    newest = latest(tmp_path)
    assert newest is not None
    tensors = verify(newest).tensors
    assert {name.split("/")[1] for name in tensors if "/" in name} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(tensors) == 4 * len([name for name in tensors if "/" not in name])
    if shape.experts:
        assert tensors["blocks.0.mlp.experts.up"].shape == (8, 6, 32)
        assert not [name for name in tensors if "deepspeed" in name]


def _sharded() -> tuple[Transformer, torch.optim.AdamW]:
    mesh = Mesh(Grid(2, 1), 2)
    model = Transformer(MOE, mesh, AttentionOptions(), ep_size=2)
    model.init_weights(0)
    assert shard_over_data(model, mesh)
    return model, optimizer_of(model)


def _over_data(folder: Path) -> None:
    model, optimizer = _sharded()
    save(folder / "sharded", model, [optimizer])
    check_loads(folder / "sharded", *build(MOE, Grid(1, 4)))
    saved(folder / "whole", MOE, Grid(2, 2), 1)
    check_loads(folder / "whole", *_sharded())


def test_what_is_sharded_over_data_loads_where_it_is_not_and_back(tmp_path: Path) -> None:
    on_ranks(4, _over_data, tmp_path)


def _other_modules(folder: Path) -> None:
    layer = HelixAttention(32, 4, mesh=Mesh(Grid(2, 1)))
    layer.init_weights(0)
    save(folder / "layer", layer)
    whole, again = HelixAttention(32, 4), HelixAttention(32, 4)
    whole.init_weights(0)
    load(folder / "layer", again)
    assert_same(held(again), held(whole))

    model, _ = build(DENSE, Grid(2, 1))
    other, _ = build(DENSE, Grid(2, 1), seed=1)
    save(folder / "part", nn.ModuleDict({"model": model}))
    load(folder / "part", other)
    assert_same(held(other), held(model))


def test_a_layer_without_a_mesh_and_a_part_of_what_was_saved(tmp_path: Path) -> None:
    on_ranks(2, _other_modules, tmp_path)


def _in_background(folder: Path) -> None:
    model, optimizer = build(MOE, Grid(2, 1))
    before = held(model, optimizer)
    saver = BackgroundSaver()
    assert saver.wait() is None
    assert saver.save(folder, model, [optimizer], step=1) is None
    change(model)  # while it is being written
    first = saver.save(folder, model, [optimizer], step=2)
    assert first is not None
    assert first.path.name == "00001-step-1"
    assert first.held_s > 0
    after = held(model, optimizer)
    second = saver.wait()
    assert second is not None
    assert second.nbytes == first.nbytes > 0
    for done, expected in ((first, before), (second, after)):
        load(done.path, model, [optimizer])
        assert_same(held(model, optimizer), expected)


def test_a_save_in_the_background_is_of_the_moment_it_began(tmp_path: Path) -> None:
    on_ranks(2, _in_background, tmp_path)


def _misfits(folder: Path) -> list[str]:
    reasons = []
    model, optimizer = build(DENSE, Grid(2, 1))
    save(folder, model, [optimizer])
    wide, wide_optimizer = build(replace(DENSE, mlp_hidden=12), Grid(2, 1))
    before = held(wide)
    sliced = Transformer(DENSE, Mesh(Grid(2, 1)), AttentionOptions(schedule="perslice"))
    one_group = torch.optim.AdamW(model.parameters())
    sgd = torch.optim.SGD(model.parameters())
    for other, optimizers in (
        (wide, [wide_optimizer]),
        (sliced, []),
        (nn.ModuleDict({"embedding": model.embedding, "more": nn.Linear(1, 1)}), []),
        (nn.ModuleDict({"norm": nn.LayerNorm(2, bias=False)}), []),
        (model, [one_group]),
        (model, [sgd]),
        (model, [optimizer, sgd]),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(folder, other, optimizers)
        reasons.append(str(caught.value))
    assert_same(held(wide), before)
    return reasons


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path: Path) -> None:
    there = tmp_path / "00001-step-0"
    another = "parallel.schedule=perslice parallel.m=2, which is another function of the same weights"
    for reasons in on_ranks(2, _misfits, tmp_path):
        assert reasons == [
            f"{there} was trained with model.mlp_hidden=20, and the model here has model.mlp_hidden=12; "
            "set model.mlp_hidden=20",
            f"{there} was trained with parallel.schedule=auto, and the model here has {another}; "
            "set parallel.schedule=auto",
            f"the model's more.weight is not in the checkpoint {there}",
            f"norm.weight is [64] in the checkpoint {there}, and [2] in the model",
            f"optimizer 0 of the checkpoint {there} has 2 parameter groups, not 1",
            f"optimizer 0 of the checkpoint {there} is AdamW, not SGD",
            f"the checkpoint {there} has 1 optimizers' state, not 2's",
        ]
