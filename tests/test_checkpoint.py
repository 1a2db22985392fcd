"""Checkpoints on any grid: parameters and optimizer state come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpointed import DENSE, LARGE, MOE, build, digests_of, loaded, make_optimizer, step_once, trained
from ranks import on_ranks
from torch import nn

from helix.attention import HelixAttention
from helix.checkpoint import manifest
from helix.checkpoint.save_and_load import BackgroundSaver, CheckpointError, load, save
from helix.comm.mesh import Mesh
from helix.models.plain import PlainTransformer
from helix.models.transformer import Transformer
from helix.parallel.shard_data import shard_over_data
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape


def _check_loads(folder: Path, saved: dict[str, str], shape: TransformerShape, ranks: int, *args: object) -> None:
    for digests, extra, lr in on_ranks(ranks, loaded, folder, shape, *args, timeout_s=60):
        assert digests == saved
        assert extra == {"step": 2}
        assert lr == 0.01


def test_a_dense_model_loads_on_every_grid(tmp_path: Path) -> None:
    everyone = on_ranks(4, trained, tmp_path, DENSE, Grid(2, 2))
    saved = everyone[0]
    assert all(each == saved for each in everyone)
    assert {name.split("/")[1] for name in saved if "/" in name} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(saved) == 4 * len([name for name in saved if "/" not in name])
    for grid in (Grid(1, 1), Grid(4, 1), Grid(1, 4), Grid(2, 2)):
        _check_loads(tmp_path, saved, DENSE, grid.ranks, grid)
    _check_loads(tmp_path, saved, DENSE, 4, Grid(2, 1), 2)


def test_experts_load_by_their_global_number(tmp_path: Path) -> None:
    saved = on_ranks(4, trained, tmp_path, MOE, Grid(2, 1), 2)[0]  # two experts a rank, twice
    assert manifest.verify(manifest.latest(tmp_path)).tensors["blocks.0.mlp.experts.up"].shape == (4, 6, 32)
    _check_loads(tmp_path, saved, MOE, 1, Grid(1, 1))
    for ep_size in (1, 2, 4):
        _check_loads(tmp_path, saved, MOE, 4, Grid(1, 4), 1, ep_size)


def test_names_shapes_and_dtypes_are_the_same_on_every_grid(tmp_path: Path) -> None:
    found = []
    for grid in (Grid(1, 1), Grid(2, 1), Grid(1, 4)):
        folder = tmp_path / grid.name
        on_ranks(grid.ranks, trained, folder, MOE, grid)
        tensors = manifest.verify(manifest.latest(folder)).tensors
        found.append({name: (entry.shape, entry.dtype) for name, entry in tensors.items()})
    assert found[0] == found[1] == found[2]
    assert all("deepspeed" not in name for name in found[0])


def _saved_sharded(folder: Path, load_first: bool) -> dict[str, str]:
    mesh = Mesh(Grid(2, 1), 2)
    model = Transformer(MOE, mesh, AttentionOptions(), ep_size=2)
    model.init_weights(0)
    assert shard_over_data(model, mesh)
    optimizer = make_optimizer(model)
    if load_first:
        load(folder, model, [optimizer])
    else:
        step_once(model, optimizer)
        save(folder, model, [optimizer], {"step": 2})
    return digests_of(model, optimizer)


def test_what_is_sharded_over_data_loads_where_it_is_not_and_back(tmp_path: Path) -> None:
    saved = on_ranks(4, _saved_sharded, tmp_path, False)[0]
    _check_loads(tmp_path, saved, MOE, 1, Grid(1, 1))
    assert all(digests == saved for digests in on_ranks(4, _saved_sharded, tmp_path, True))


@pytest.mark.slow
def test_16_ranks_and_other_grids(tmp_path: Path) -> None:
    saved = on_ranks(16, trained, tmp_path, LARGE, Grid(4, 4), timeout_s=80)[0]
    for grid in (Grid(2, 8), Grid(1, 1), Grid(2, 2), Grid(4, 1), Grid(1, 4)):
        _check_loads(tmp_path, saved, LARGE, grid.ranks, grid)


def _single(folder: Path, shape: TransformerShape) -> dict[str, str]:
    model = PlainTransformer(shape)
    optimizer = make_optimizer(model)
    # The grid's optimizer has its groups by the same rule; PlainTransformer's q_norm.weight is a norm, too.
    load(folder, model, [optimizer])
    return digests_of(model, optimizer)


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_a_grids_checkpoint_runs_on_a_single_device(tmp_path: Path, shape: TransformerShape) -> None:
    saved = on_ranks(4, trained, tmp_path, shape, Grid(2, 2))[0]
    assert on_ranks(1, _single, tmp_path, shape)[0] == saved


def _attention(folder: Path, grid: Grid | None) -> dict[str, str]:
    layer = HelixAttention(32, 4, mesh=Mesh(grid) if grid else None)
    if grid:
        layer.init_weights(0)
        save(folder, layer)
    else:
        load(folder, layer)
    return digests_of(layer)


def test_a_layer_without_a_mesh(tmp_path: Path) -> None:
    assert on_ranks(4, _attention, tmp_path, Grid(2, 2))[0] == on_ranks(1, _attention, tmp_path, None)[0]


def _part(folder: Path) -> bool:
    model, _ = build(DENSE, Grid(2, 1))
    other, _ = build(DENSE, Grid(2, 1), seed=1)
    save(folder, nn.ModuleDict({"model": model}))
    load(folder, other)
    return digests_of(other) == digests_of(model)


def test_a_part_of_the_saved_module_finds_its_weights(tmp_path: Path) -> None:
    assert all(on_ranks(2, _part, tmp_path))


def _in_background(folder: Path) -> None:
    model, optimizer = build(MOE, Grid(2, 1))
    step_once(model, optimizer)
    before = digests_of(model, optimizer)
    saver = BackgroundSaver()
    assert saver.wait() is None
    assert saver.save(folder, model, [optimizer], step=1) is None
    step_once(model, optimizer)  # while it is being written
    first = saver.save(folder, model, [optimizer], step=2)
    assert first is not None
    assert first.path.name == "00001-step-1"
    assert first.held_s > 0
    after = digests_of(model, optimizer)
    second = saver.wait()
    assert second is not None
    assert second.nbytes == first.nbytes > 0
    for saved, expected in ((first, before), (second, after)):
        load(saved.path, model, [optimizer])
        assert digests_of(model, optimizer) == expected


def test_a_save_in_the_background_is_of_the_moment_it_began(tmp_path: Path) -> None:
    on_ranks(2, _in_background, tmp_path)


def _misfits(folder: Path) -> list[str]:
    reasons = []
    model, optimizer = build(DENSE, Grid(2, 1))
    save(folder, model, [optimizer])
    wide, wide_optimizer = build(
        TransformerShape(2, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=12, vocab=5, qk_norm=True, rope=True),
        Grid(2, 1),
    )
    before = digests_of(wide)
    deep, _ = build(TransformerShape(3, 32, 4, 4, 8, mlp_hidden=10, vocab=5, qk_norm=True, rope=True), Grid(2, 1))
    flat, _ = build(TransformerShape(1, 32, 4, 4, 8, mlp_hidden=10, vocab=5, qk_norm=True, rope=True), Grid(2, 1))
    one_group = torch.optim.AdamW(model.parameters())
    sgd = torch.optim.SGD(model.parameters())
    for other, optimizers in (
        (wide, [wide_optimizer]),
        (deep, []),
        (flat, []),
        (model, [one_group]),
        (model, [sgd]),
        (model, [optimizer, sgd]),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(folder, other, optimizers)
        reasons.append(str(caught.value))
    assert digests_of(wide) == before
    return reasons


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path: Path) -> None:
    there = tmp_path / "00001-step-0"
    for reasons in on_ranks(2, _misfits, tmp_path):
        assert reasons == [
            f"blocks.0.mlp.up is [10, 32] in the checkpoint {there}, and [12, 32] in the model",
            f"the model's blocks.2.attention_norm.weight is not in the checkpoint {there}",
            f"blocks.1.attention.k_norm of the checkpoint {there} is not in the model",
            f"optimizer 0 of the checkpoint {there} has 2 parameter groups, not 1",
            f"optimizer 0 of the checkpoint {there} is AdamW, not SGD",
            f"the checkpoint {there} has 1 optimizers' state, not 2's",
        ]
