"""HelixCheckpoints under Lightning: a run that was cut goes on as if it had not been."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import on_ranks
from torch.utils.data import DataLoader

from helix.checkpoint.manifest import checkpoints
from helix.checkpoint.save_and_load import CheckpointError, save
from helix.models.transformer import Transformer
from helix.parallel.checkpoint_callback import HelixCheckpoints
from helix.parallel.strategy import HelixStrategy
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

SHAPE = TransformerShape(1, 16, heads=4, kv_heads=4, head_dim=4, mlp_hidden=16, vocab=16)


class _Batches(torch.utils.data.IterableDataset[torch.Tensor]):
    """Batch i is a function of i; a resumed run begins with the one that is next."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Any:
        for index in range(self.first, 1000):
            yield torch.randint(16, (2, 4), generator=torch.Generator().manual_seed(index))


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.data_position = 0
        self.seen: list[tuple[int, float, float]] = []

    def configure_model(self) -> None:
        self.model = Transformer(SHAPE, self.trainer.strategy.mesh, AttentionOptions())
        self.model.init_weights(0)

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        self.data_position += 1
        noise = torch.rand(())  # a loss that depends on the generator
        loss = self.model(tokens).square().sum() * (1 + noise)
        self.seen.append((self.data_position, float(loss.detach()), self.optimizers().param_groups[0]["lr"]))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, foreach=False)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["width"] = SHAPE.width

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint == {"width": SHAPE.width}

    def train_dataloader(self) -> Any:
        return DataLoader(_Batches(self.data_position), batch_size=None)


class Steps(Callback):
    """Another callback, with state of its own."""

    count = 0

    def on_train_batch_end(self, *_: object) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Unscheduled(Lit):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


class Stop(Callback):
    """Ends training after so many batches, as time does: where a step's gradients may be half accumulated."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        trainer.should_stop = module.data_position == self.batches


def _fit(
    grid: Grid,
    steps: int,
    checkpoints: HelixCheckpoints | None,
    accumulate: int = 1,
    most: int | None = None,
    kind: type[Lit] = Lit,
) -> tuple[Lit, Steps]:
    """Train for `steps` steps; with `most`, for so many batches."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning\.")
    torch.manual_seed(0)
    counter = Steps()
    trainer = Trainer(
        strategy=HelixStrategy(grid),
        accelerator="cpu",
        devices=grid.ranks,
        max_steps=-1 if most else steps,
        accumulate_grad_batches=accumulate,
        callbacks=[counter, *([checkpoints] if checkpoints else []), *([Stop(most)] if most else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = kind()
    trainer.fit(module)
    assert trainer.global_step == steps
    return module, counter


def _cut_and_resumed(folder: Path, grid: Grid, accumulate: int, background: bool) -> tuple[list, list, int]:
    whole, _ = _fit(grid, 6, None, accumulate)
    first = HelixCheckpoints(folder, every_n_steps=2, keep=2, background=background)
    most = 4 * accumulate - 1  # every batch a step, or between the third and the fourth
    _fit(grid, 3, first, accumulate, most)
    assert first.resumed is None
    assert first.last is not None
    assert first.last.path.name == "00002-step-3"
    second = HelixCheckpoints(folder, every_n_steps=2, keep=2, background=background)
    rest, counter = _fit(grid, 6, second, accumulate)
    assert second.resumed is not None
    assert second.resumed.path.name == "00002-step-3"
    assert [path.name for path in checkpoints(folder)] == ["00003-step-4", "00004-step-6"]
    return whole.seen, rest.seen, counter.count


@pytest.mark.parametrize(("accumulate", "background"), [(1, False), (2, True)])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, accumulate: int, background: bool) -> None:
    for whole, rest, count in on_ranks(2, _cut_and_resumed, tmp_path, Grid(2, 1), accumulate, background):
        assert len(whole) == 6 * accumulate
        assert len({lr for _, _, lr in whole}) == 3
        assert rest == whole[3 * accumulate :]  # losses, learning rates and the data's order
        assert count == 6 * accumulate + accumulate - 1  # of batches that are seen twice, too


def _on_another_grid(folder: Path, grid: Grid, steps: int) -> list[tuple[int, float, float]]:
    return _fit(grid, steps, HelixCheckpoints(folder))[0].seen


def test_a_run_goes_on_on_another_grid(tmp_path: Path) -> None:
    whole = on_ranks(1, _on_another_grid, tmp_path / "whole", Grid(1, 1), 4)[0]
    on_ranks(2, _on_another_grid, tmp_path / "cut", Grid(2, 1), 2)
    rest = on_ranks(1, _on_another_grid, tmp_path / "cut", Grid(1, 1), 4)[0]
    assert [(index, lr) for index, _, lr in rest] == [(index, lr) for index, _, lr in whole[2:]]
    # Two steps of AdamW on gradients that were summed in another order, in fp32.
    torch.testing.assert_close([loss for _, loss, _ in rest], [loss for _, loss, _ in whole[2:]], rtol=1e-3, atol=0)


def _resumes(folder: Path, resume: str | None) -> None:
    _fit(Grid(2, 1), 1, HelixCheckpoints(folder, resume=resume))


def _of_another_model(folder: Path, unscheduled: Path) -> None:
    with pytest.raises(CheckpointError, match="has 1 learning-rate schedules, and the module 0"):
        _fit(Grid(2, 1), 2, HelixCheckpoints(unscheduled), kind=Unscheduled)
    save(folder, torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="is not in the checkpoint"):
        _resumes(folder, "latest")


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        on_ranks(2, _resumes, tmp_path, str(tmp_path / "missing"))
    on_ranks(2, _resumes, tmp_path, "latest")  # nothing there yet: from the start
    assert len(checkpoints(tmp_path)) == 1
    on_ranks(2, _resumes, tmp_path, None)  # anew
    assert len(checkpoints(tmp_path)) == 2
    on_ranks(2, _of_another_model, tmp_path / "other", tmp_path)
    with pytest.raises(CheckpointError, match="every_n_steps must be at least 1"):
        HelixCheckpoints(tmp_path, every_n_steps=0)
