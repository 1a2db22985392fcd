"""HelixStrategy under Lightning: mesh, samplers, signals."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from ranks import on_ranks
from torch.utils.data import DataLoader

from helix.models.transformer import Transformer
from helix.parallel.strategy import HelixStrategy
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

SHAPE = TransformerShape(1, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=64, vocab=256)


class Lit(LightningModule):
    """A user's own module: it partitions in configure_model."""

    def configure_model(self) -> None:
        self.model = Transformer(SHAPE, self.trainer.strategy.mesh, AttentionOptions())
        self.model.init_weights(0)

    def predict_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        self.sigterm = signal.getsignal(signal.SIGTERM)
        return self.model.whole_logits(self.model(tokens))


def _predict(grid: Grid, data: int, ranks: int) -> tuple[list[torch.Tensor], bool, tuple[int, int]]:
    strategy = HelixStrategy(grid, data=data)
    with pytest.raises(RuntimeError, match="once the Trainer"):
        _ = strategy.mesh
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Lit()
    tokens = torch.randint(256, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    out = trainer.predict(module, DataLoader(list(tokens), batch_size=None))
    sampler = strategy.distributed_sampler_kwargs
    return out, module.sigterm is signal.SIG_DFL, (sampler["num_replicas"], sampler["rank"])


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_predict_is_the_single_ranks() -> None:
    single = on_ranks(1, _predict, Grid(1, 1), 1, 1)[0][0]
    for out, sigterm_is_default, _ in on_ranks(4, _predict, Grid(2, 2), 1, 4):
        for value, expected in zip(out, single, strict=True):
            # fp32 over one layer: 1e-5 of the largest logit.
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        # Lightning's own handler broadcasts, which a rank whose group is dying would wait in.
        assert sigterm_is_default


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_samplers_see_the_data_axis_only() -> None:
    replicas = [sampler for _, _, sampler in on_ranks(4, _predict, Grid(2, 1), 2, 4)]
    assert replicas == [(2, 0), (2, 0), (2, 1), (2, 1)]


def test_a_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(PartitionError, match="needs 4 ranks, not the 2"):
        on_ranks(2, _predict, Grid(2, 2), 1, 2)
    assert "WORLD_SIZE" not in os.environ
