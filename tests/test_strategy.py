"""HelixStrategy under Lightning: mesh, samplers, signals; fit equal to the single device's, metrics, hooks."""

from __future__ import annotations

import os
import signal

import fitting
import pytest
import torch
import torch.nn.functional as F
from fitting import DENSE, MOE, Seen, Watch, make_trainer
from lightning.pytorch import LightningModule, Trainer
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helix.attention import HelixAttention
from helix.comm.record import record
from helix.models.transformer import Transformer
from helix.parallel.strategy import HelixStrategy
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
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


def test_predict_is_the_single_ranks() -> None:
    single = on_ranks(1, _predict, Grid(1, 1), 1, 1)[0][0]
    for out, sigterm_is_default, _ in on_ranks(4, _predict, Grid(2, 2), 1, 4):
        for value, expected in zip(out, single, strict=True):
            # fp32 over one layer: 1e-5 of the largest logit.
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        # Lightning's own handler broadcasts, which a rank whose group is dying would wait in.
        assert sigterm_is_default


def test_samplers_see_the_data_axis_only() -> None:
    replicas = [sampler for _, _, sampler in on_ranks(4, _predict, Grid(2, 1), 2, 4)]
    assert replicas == [(2, 0), (2, 0), (2, 1), (2, 1)]


def test_a_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(PartitionError, match="needs 4 ranks, not the 2"):
        on_ranks(2, _predict, Grid(2, 2), 1, 2)
    assert "WORLD_SIZE" not in os.environ


def _fit(
    grid: Grid, data: int, shape: TransformerShape, batch: int, shard_data: bool = False, ep_size: int | None = None
) -> tuple[Seen, dict]:
    """Two steps of two micro-batches each, all dealt out by Lightning from an ordinary loader."""
    strategy = HelixStrategy(grid, data, precision="64-true", shard_data=shard_data)
    with record() as log:
        watch = fitting.fit(
            fitting.Lit(shape, ep_size), strategy, 16, batch, accumulate_grad_batches=2, gradient_clip_val=0.1
        )
    return watch, dict(log.calls)


def _equal(results: list[tuple[Seen, dict]], expected: Seen, moe: bool = False) -> None:
    """fp64, sums in another order; the experts' router is fp32, and every gradient is clipped by a norm with it."""
    tolerance = 1e-6 if moe else 1e-10
    for watch, _ in results:
        torch.testing.assert_close(watch.losses, expected.losses, rtol=tolerance, atol=0)
        torch.testing.assert_close(watch.norms, expected.norms, rtol=tolerance, atol=0)
        for found, wanted in ((watch.gradients, expected.gradients), (watch.parameters, expected.parameters)):
            assert len(found) == len(wanted) == 2
            for step, expected_step in zip(found, wanted, strict=True):
                assert step.keys() == expected_step.keys()
                for name, value in expected_step.items():
                    atol = tolerance * float(value.abs().max())
                    torch.testing.assert_close(step[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def _expected(shape: TransformerShape) -> Seen:
    watch, _ = on_ranks(1, _fit, Grid(1, 1), 1, shape, 4)[0]
    assert all(norm > 0.1 for norm in watch.norms)  # so clipping does clip
    seen, clipped = watch.gradients[0]["model.norm.weight"], watch.clipped[0]["model.norm.weight"]
    torch.testing.assert_close(clipped, seen * 0.1 / watch.norms[0], rtol=1e-4, atol=0)
    return watch


def test_fit_accumulates_clips_and_steps_as_the_single_device() -> None:
    expected = _expected(DENSE)
    for grid, data in ((Grid(2, 2), 1), (Grid(4, 1), 1), (Grid(1, 4), 1), (Grid(2, 1), 2), (Grid(1, 1), 2)):
        _equal(on_ranks(grid.ranks * data, _fit, grid, data, DENSE, 4 // data), expected)


def test_fit_with_experts() -> None:
    expected = _expected(MOE)
    _equal(on_ranks(4, _fit, Grid(2, 2), 1, MOE, 4), expected, moe=True)
    _equal(on_ranks(4, _fit, Grid(1, 2), 2, MOE, 2), expected, moe=True)


def test_gradients_are_reduced_once_a_step_and_never_for_a_micro_batch() -> None:
    watch, calls = on_ranks(4, _fit, Grid(2, 1), 2, DENSE, 2)[0]
    assert len(watch.losses) == 4  # micro-batches
    of_gradients = {key: count for key, count in calls.items() if "gradient" in key}
    assert of_gradients == dict.fromkeys(
        ("all_reduce/gradient.slice", "all_reduce/gradient.data", "all_reduce/gradient_norm.model"), 2
    )


class Manual(fitting.Lit):
    """Optimizes by hand, and finds that it cannot clip what is not reduced yet."""

    def __init__(self) -> None:
        super().__init__(DENSE)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, batch_size=len(batch))
        self.manual_backward(loss)
        with pytest.raises(ValueError, match="call reduce_gradients first"):
            self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        return loss


def _by_hand(manual: bool, precision: str) -> Seen:
    module = Manual() if manual else fitting.Lit(DENSE)
    return fitting.fit(module, HelixStrategy(Grid(2, 1), 2, precision=precision), samples=8, batch=2)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_manual_optimization_is_reduced_and_scaled_too(precision: str) -> None:
    manual, automatic = on_ranks(4, _by_hand, True, precision)[0], on_ranks(4, _by_hand, False, precision)[0]
    assert manual.losses == automatic.losses
    for name, value in automatic.parameters[-1].items():
        assert torch.equal(manual.parameters[-1][name], value), name


class TenLines(LightningModule):
    """A user's own module: Helix' attention between ordinary layers."""

    def configure_model(self) -> None:
        if hasattr(self, "attention"):
            return
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.attention = HelixAttention(32, heads=4, mesh=self.trainer.strategy.mesh)
        self.attention.init_weights(seed=0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.attention(x))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        for key in ("loss", "val_loss", "test_loss"):
            if key == {"fit": "loss", "validate": "val_loss", "test": "test_loss"}[self.trainer.state.fn]:
                self.log(key, loss, sync_dist=True, batch_size=len(batch))
        return loss

    validation_step = test_step = training_step

    def predict_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch[:, :-1]).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def _ten_lines(
    grid: Grid, data: int, batch: int, shard_data: bool = False
) -> tuple[list[float], dict[str, float], list[Tensor]]:
    ranks = grid.ranks * data
    watch = Watch()
    strategy = HelixStrategy(grid, data, precision="64-true", shard_data=shard_data)
    trainer = make_trainer(strategy, ranks, watch, max_epochs=2)
    loader = DataLoader(list(fitting.tokens(8)), batch_size=batch)
    module = TenLines()
    trainer.fit(module, loader)
    metrics = trainer.validate(module, loader, verbose=False)[0] | trainer.test(module, loader, verbose=False)[0]
    predictions = trainer.predict(module, loader)
    assert predictions is not None
    return watch.seen.losses, metrics, predictions


# FSDP2 warns of in-place changes to a view that its unit returns, as HelixAttention does of its [B, T, E].
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_a_users_ten_line_module_fits_validates_tests_and_predicts() -> None:
    losses, metrics, predictions = on_ranks(1, _ten_lines, Grid(1, 1), 1, 4)[0]
    assert losses[-1] < losses[0] - 0.1
    assert metrics.keys() == {"val_loss", "test_loss"}
    for grid, data, shard_data in ((Grid(2, 2), 1, False), (Grid(2, 1), 2, False), (Grid(1, 2), 2, True)):
        results = on_ranks(4, _ten_lines, grid, data, 4 // data, shard_data)
        for rank, (found, found_metrics, found_predictions) in enumerate(results):
            torch.testing.assert_close(found, losses, rtol=1e-10, atol=0)
            torch.testing.assert_close(found_metrics, metrics, rtol=1e-10, atol=0)
            replica = rank // grid.ranks
            own = torch.cat(predictions)[replica::data]  # dealt out sample by sample
            assert torch.equal(torch.cat(found_predictions), own)


class Logged(fitting.Lit):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        replica = self.trainer.strategy.mesh.data.rank
        self.log("mean", torch.tensor(float(replica)), sync_dist=True)
        self.log("sum", torch.tensor(1.0), sync_dist=True, reduce_fx="sum")
        rank = self.trainer.strategy.global_rank
        self.decisions = [
            self.trainer.strategy.reduce_boolean_decision(decision, all=every)
            for decision, every in ((rank != 3, True), (rank == 3, False), (True, True), (False, False))
        ]
        return super().training_step(batch, index)


def _logged(grid: Grid, data: int) -> tuple[float, float, list[bool]]:
    module = Logged(DENSE)
    fitting.fit(module, HelixStrategy(grid, data), samples=4, batch=4 // data)
    metrics = module.trainer.callback_metrics
    return float(metrics["mean"]), float(metrics["sum"]), module.decisions


def test_logged_metrics_are_reduced_over_data_and_decisions_over_the_world() -> None:
    assert on_ranks(4, _logged, Grid(2, 1), 2) == [(0.5, 2.0, [False, True, True, False])] * 4
    assert on_ranks(4, _logged, Grid(2, 2), 1) == [(0.0, 1.0, [False, True, True, False])] * 4


def test_sharding_over_data_changes_nothing_but_memory() -> None:
    expected = _expected(DENSE)
    for grid in (Grid(2, 1), Grid(1, 2)):
        _equal(on_ranks(4, _fit, grid, 2, DENSE, 2, True), expected)


def test_experts_are_sharded_over_data() -> None:
    expected = _expected(MOE)
    _equal(on_ranks(4, _fit, Grid(2, 1), 2, MOE, 2, True), expected, moe=True)
    _equal(on_ranks(4, _fit, Grid(2, 1), 2, MOE, 2, True, 1), expected, moe=True)  # two replicas of every expert


def _held(shard_data: bool) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    module = fitting.Lit(MOE)
    fitting.fit(module, HelixStrategy(Grid(2, 1), 2, shard_data=shard_data), samples=4, batch=2)
    held = {name: p.to_local().numel() for name, p in module.named_parameters()}
    return held, {name: p.device_mesh.mesh_dim_names for name, p in module.named_parameters()}


def test_a_rank_holds_its_share_of_every_matrix() -> None:
    plain, sharded = on_ranks(4, _held, False)[0][0], on_ranks(4, _held, True)
    for held, axes in sharded:
        for name, count in plain.items():
            replicated = name.endswith("norm.weight") or "gate" in name
            assert held[name] == count // (1 if replicated else 2), name
            assert ("data" in axes[name]) is not replicated, name
