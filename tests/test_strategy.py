"""HelixStrategy under Lightning: fit equal to the single device's, sharded over data too; metrics, hooks, signals."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from typing import Any

import fitting
import pytest
import torch
import torch.nn.functional as F
from fitting import DENSE, MOE, Seen, Watch, each_on_ranks, make_trainer
from lightning.pytorch import Callback, LightningModule
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helix.attention import HelixAttention
from helix.comm.record import record
from helix.parallel.strategy import HelixStrategy
from helix.partition.grid import Grid, PartitionError
from helix.partition.shape import TransformerShape

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.usefixtures("deepspeed"),
]


def _wrong_number() -> None:
    strategy = HelixStrategy(Grid(2, 2))
    with pytest.raises(RuntimeError, match="once the Trainer"):
        _ = strategy.mesh
    fitting.fit(fitting.Lit(DENSE), strategy, samples=4, batch=4)


def test_a_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(PartitionError, match="needs 4 ranks, not the 2"):
        on_ranks(2, _wrong_number)
    assert "WORLD_SIZE" not in os.environ


def _alone() -> None:
    seen = fitting.fit(fitting.Lit(DENSE), HelixStrategy(Grid(1, 1)), samples=8, batch=4)
    assert len(seen.losses) == 2


def test_without_a_launcher_there_is_one_rank() -> None:
    with pytest.raises(ValueError, match=r"nobody has started the 4 .*: start them with helix\.launch, torchrun or"):
        make_trainer(HelixStrategy(Grid(2, 2)), 4)
    alone = get_context("fork").Process(target=_alone)
    alone.start()
    alone.join(20)
    assert alone.exitcode == 0


def _fit(
    shape: TransformerShape, grid: Grid, data: int = 1, shard_data: bool = False, ep_size: int | None = None
) -> tuple[Seen, dict[str, int]]:
    """Two steps of two micro-batches each, all dealt out by Lightning from an ordinary loader."""
    strategy = HelixStrategy(grid, data, precision="64-true", shard_data=shard_data)
    kept = ("gradients", "clipped", "parameters") if grid.ranks * data == 1 else ("parameters",)
    accumulating = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    with record() as log:
        seen = fitting.fit(fitting.Lit(shape, ep_size), strategy, 16, 4 // data, kept, **accumulating)
    return seen, dict(log.calls)


def _equal(found: Seen, expected: Seen, tolerance: float) -> None:
    """The parameters after each step have every gradient in them, clipped and summed."""
    torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=0)
    torch.testing.assert_close(found.norms, expected.norms, rtol=tolerance, atol=0)
    assert len(found.parameters) == len(expected.parameters) == 2
    for step, expected_step in zip(found.parameters, expected.parameters, strict=True):
        assert step.keys() == expected_step.keys()
        for name, value in expected_step.items():
            atol = tolerance * float(value.abs().max())
            torch.testing.assert_close(step[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_fit_accumulates_clips_and_steps_as_the_single_device() -> None:
    dense, moe = each_on_ranks(1, _fit, [(DENSE, Grid(1, 1)), (MOE, Grid(1, 1))])
    single = {DENSE: dense[0][0], MOE: moe[0][0]}
    for seen in single.values():
        assert all(norm is not None and norm > 0.1 for norm in seen.norms)  # so clipping does clip
        free, clipped = seen.gradients[0]["model.norm.weight"], seen.clipped[0]["model.norm.weight"]
        torch.testing.assert_close(clipped, free * 0.1 / seen.norms[0], rtol=1e-4, atol=0)
    cases = [
        (DENSE, Grid(2, 2)),
        (DENSE, Grid(2, 1), 2),
        (DENSE, Grid(1, 1), 4),
        (DENSE, Grid(2, 1), 2, True),
        (MOE, Grid(2, 2)),
        (MOE, Grid(1, 2), 2),
        (MOE, Grid(2, 1), 2, True),
        (MOE, Grid(2, 1), 2, True, 1),  # two replicas of every expert
    ]
    results = each_on_ranks(4, _fit, cases)
    for (shape, *_), ranks in zip(cases, results, strict=True):
        for seen, _ in ranks:
            # fp64, sums in another order; the experts' router is fp32, and the norm that clips has it in it.
            _equal(seen, single[shape], 1e-6 if shape.experts else 1e-10)
    # Of two steps and four micro-batches.
    seen, calls = results[1][0]
    assert len(seen.losses) == 4
    assert {key: count for key, count in calls.items() if "gradient" in key} == dict.fromkeys(
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
    strategy = HelixStrategy(Grid(2, 1), 2, precision=precision)
    return fitting.fit(module, strategy, samples=8, batch=2, kept=("parameters",))


def test_manual_optimization_is_reduced_and_scaled_too() -> None:
    cases = [(manual, precision) for precision in ("32-true", "16-mixed") for manual in (True, False)]
    seen = [ranks[0] for ranks in each_on_ranks(4, _by_hand, cases)]
    for manual, automatic in (seen[:2], seen[2:]):
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


class Signals(Callback):
    """What SIGTERM does while the module works: Lightning's own handler broadcasts, and waits for a dead group."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.found.append(signal.getsignal(signal.SIGTERM))

    def on_validation_batch_start(self, *args: Any) -> None:
        self.found.append(signal.getsignal(signal.SIGTERM))

    def on_test_batch_start(self, *args: Any) -> None:
        self.found.append(signal.getsignal(signal.SIGTERM))

    def on_predict_batch_start(self, *args: Any) -> None:
        self.found.append(signal.getsignal(signal.SIGTERM))


def _ten_lines(
    grid: Grid, data: int = 1, shard_data: bool = False
) -> tuple[list[float], dict[str, float], list[Tensor]]:
    watch, signals = Watch(), Signals()
    strategy = HelixStrategy(grid, data, precision="64-true", shard_data=shard_data)
    trainer = make_trainer(strategy, grid.ranks * data, watch, signals, max_epochs=2)
    loader = DataLoader(list(fitting.tokens(8)), batch_size=4 // data)
    module = TenLines()
    trainer.fit(module, loader)
    metrics = trainer.validate(module, loader, verbose=False)[0] | trainer.test(module, loader, verbose=False)[0]
    predictions = trainer.predict(module, loader)
    assert predictions is not None
    assert signals.found == [signal.SIG_DFL] * 10  # two batches of each, and two epochs of training
    return watch.seen.losses, metrics, predictions


# FSDP2 warns of in-place changes to a view that its unit returns, as HelixAttention does of its [B, T, E].
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_a_users_ten_line_module_fits_validates_tests_and_predicts() -> None:
    losses, metrics, predictions = on_ranks(1, _ten_lines, Grid(1, 1))[0]
    assert losses[-1] < losses[0] - 0.1
    assert metrics.keys() == {"val_loss", "test_loss"}
    cases = [(Grid(2, 2), 1, False), (Grid(1, 2), 2, True)]
    for (grid, data, _), results in zip(cases, each_on_ranks(4, _ten_lines, cases), strict=True):
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
    replicas, one = each_on_ranks(4, _logged, [(Grid(2, 1), 2), (Grid(2, 2), 1)])
    assert replicas == [(0.5, 2.0, [False, True, True, False])] * 4
    assert one == [(0.0, 1.0, [False, True, True, False])] * 4


def _held(shard_data: bool) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    module = fitting.Lit(MOE)
    fitting.fit(module, HelixStrategy(Grid(2, 1), 2, shard_data=shard_data), samples=4, batch=2)
    held = {name: p.to_local().numel() for name, p in module.named_parameters()}
    return held, {name: p.device_mesh.mesh_dim_names for name, p in module.named_parameters()}


def test_a_rank_holds_its_share_of_every_matrix() -> None:
    whole, sharded = each_on_ranks(4, _held, [(False,), (True,)])
    plain = whole[0][0]
    for held, axes in sharded:
        for name, count in plain.items():
            replicated = name.endswith("norm.weight") or "gate" in name
            assert held[name] == count // (1 if replicated else 2), name
            assert ("data" in axes[name]) is not replicated, name
