"""Mixed precision: what runs in which dtype, and a loss scale that all ranks agree on."""

from __future__ import annotations

import math
from typing import Any

import fitting
import pytest
import torch
from fitting import DENSE, MOE, Lit, Seen, Watch, each_on_ranks, make_trainer
from lightning.pytorch.plugins.precision import Precision
from test_train import configured
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from helix.config.schema import ConfigError
from helix.parallel.precision import DTYPES, HelixPrecision
from helix.parallel.scaler import LossScaler, make_scaler
from helix.parallel.strategy import HelixStrategy
from helix.partition.grid import Grid

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.usefixtures("deepspeed"),
]


class Overflow(Lit):
    """One rank's gradient of a sharded parameter overflows after the second backward, and nobody else's."""

    def __init__(self, rank: int) -> None:
        super().__init__(DENSE)
        self.rank, self.backwards = rank, 0

    def on_after_backward(self) -> None:
        self.backwards += 1
        gradient = self.model.blocks[0].mlp.up.grad
        assert isinstance(gradient, DTensor)
        if self.backwards == 2 and self.trainer.strategy.global_rank == self.rank:
            gradient.to_local()[0, 0] = math.inf


def _overflow(grid: Grid, data: int) -> Seen:
    strategy = HelixStrategy(grid, data, precision="16-mixed", shard_data=data > 1)
    kept = ("parameters",)
    return fitting.fit(Overflow(rank=3), strategy, samples=6 * data, batch=2, kept=kept, gradient_clip_val=1.0)


def test_an_overflow_on_one_rank_makes_all_ranks_skip_the_step() -> None:
    cases = [(Grid(2, 2), 1), (Grid(2, 1), 2)]
    for (grid, _), results in zip(cases, each_on_ranks(4, _overflow, cases), strict=True):
        start = make_scaler(grid, "adaptive").value
        for seen in results:
            first, second, third = seen.parameters
            assert seen.scales == [start, start / 2, start / 2]
            for name in first:
                assert torch.equal(first[name], second[name]), name
                assert not torch.equal(second[name], third[name]), name
                assert bool(third[name].isfinite().all())


def _fit(grid: Grid, precision: str, moe: bool = False) -> Seen:
    kept = () if moe else ("gradients",)
    return fitting.fit(Lit(MOE if moe else DENSE), HelixStrategy(grid, precision=precision), 8, batch=4, kept=kept)


def test_mixed_precision_follows_fp32() -> None:
    (dense,), (moe,) = each_on_ranks(1, _fit, [(Grid(1, 1), "32-true", experts) for experts in (False, True)])
    # bf16 has 8 bits and fp16 11: a rounding is 4e-3 and 5e-4, and some of them add up.
    precisions = {"bf16-mixed": (1e-2, 5e-2), "16-mixed": (2e-3, 1e-2)}
    cases = [(Grid(2, 2), precision, experts) for precision in precisions for experts in (False, True)]
    for (_, precision, experts), (seen, *_) in zip(cases, each_on_ranks(4, _fit, cases), strict=True):
        of_loss, of_gradient = precisions[precision]
        expected = moe if experts else dense
        # Routing may differ from fp32's where two experts are close.
        torch.testing.assert_close(seen.losses, expected.losses, rtol=2e-2 if experts else of_loss, atol=0)
        assert seen.losses != expected.losses  # it did run in the narrow type
        for name, gradient in {} if experts else expected.gradients[0].items():
            found = seen.gradients[0][name]  # what the hook sees is unscaled
            assert found.dtype == torch.float32
            assert float((found - gradient).norm() / gradient.norm()) < of_gradient, name


class Adam(Lit):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def _true(precision: str, adam: bool) -> tuple[set[torch.dtype], torch.dtype, torch.dtype, list[float]]:
    """The dtypes of a module that trains for six steps on one batch, and its losses."""
    module, watch = Adam(MOE) if adam else Lit(MOE), Watch()
    trainer = make_trainer(HelixStrategy(Grid(2, 1), precision=precision), 2, watch, max_epochs=6)
    trainer.fit(module, DataLoader(list(fitting.tokens(4)), batch_size=4))
    router = {p.dtype for name, p in module.named_parameters() if "gate" in name}
    assert len(router) == 1
    others = {p.dtype for name, p in module.named_parameters() if "gate" not in name}
    return others, router.pop(), torch.get_default_dtype(), watch.seen.losses


def test_true_precision_makes_the_parameters_in_it_and_trains_them() -> None:
    cases = [("64-true", True), ("bf16-true", True), ("bf16-true", False), ("16-true", False)]
    for (precision, adam), ranks in zip(cases, each_on_ranks(2, _true, cases), strict=True):
        for others, router, default, losses in ranks:
            assert others == {DTYPES[precision]}
            assert router == default == torch.float32
            assert len(losses) == 6
            assert losses[-1] < losses[0] - 0.1, (precision, adam)  # and so it is a number


def test_adamw_on_fp16_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"; choose precision=16-mixed or bf16-true, or optimizer=sgd$"):
        configured("precision=16-true")
    assert configured("precision=16-true", "optimizer=sgd").precision == "16-true"


def test_the_scale_starts_higher_and_grows_later_on_narrower_partitions() -> None:
    def rule(m: int, n: int, scaling: str = "adaptive") -> tuple[float, int]:
        scaler = make_scaler(Grid(m, n), scaling)
        return scaler.value, scaler.interval

    ordinary = torch.amp.GradScaler("cpu")
    assert rule(1, 1) == rule(4, 4, "ordinary") == (ordinary.get_scale(), ordinary.get_growth_interval())
    assert rule(4, 4) == rule(16, 1) == rule(1, 16) == (2.0**18, 8000)
    assert rule(3, 4) == (2.0**18, 8000)  # 2^(1.79) to a power of two
    with pytest.raises(ValueError, match="scaling=papers is not known; legal: adaptive, ordinary"):
        make_scaler(Grid(1, 1), "papers")


def test_the_scale_grows_backs_off_and_is_saved() -> None:
    scaler = LossScaler(start=8.0, interval=2)
    values = []
    for overflowed in (False, False, False, True, False, False):
        scaler.overflowed = overflowed
        scaler.update()
        values.append(scaler.value)
    assert values == [8, 16, 16, 8, 8, 16]
    plugin = HelixPrecision("16-mixed", scaler)
    scaler.overflowed = False
    scaler.update()
    restored = HelixPrecision("16-mixed", LossScaler(start=2.0, interval=2))
    restored.load_state_dict(plugin.state_dict())
    assert restored.scaler is not None
    assert restored.state_dict() == plugin.state_dict() == {"scale": 16.0, "finite_steps": 1}
    restored.scaler.update()
    assert restored.scaler.value == 32
    assert HelixPrecision("bf16-mixed").state_dict() == {}
    # fp16's largest number is below the scale itself.
    assert float(LossScaler(2.0**17).scale(torch.ones((), dtype=torch.float16))) == 2**17


def _precision_of(asked: dict[str, Any], **strategy: Any) -> str:
    trainer = make_trainer(HelixStrategy(Grid(1, 1), **strategy), 1, **asked)
    plugin = trainer.precision_plugin
    assert isinstance(plugin, HelixPrecision)
    assert (plugin.scaler is not None) == (plugin.precision == "16-mixed")
    return str(trainer.precision)


def test_precision_may_be_said_to_the_trainer_or_to_the_strategy() -> None:
    assert _precision_of({}) == "32-true"
    assert _precision_of({}, precision="16-mixed") == "16-mixed"
    for precision in ("bf16-mixed", "bf16-true", "16-true"):
        assert _precision_of({"precision": precision}) == precision
        assert _precision_of({"precision": precision}, precision=precision) == precision
    with pytest.raises(ValueError, match=r"Trainer\(precision=bf16-true\) and HelixStrategy\(precision=16-mixed\)"):
        _precision_of({"precision": "bf16-true"}, precision="16-mixed")
    with pytest.raises(ValueError, match="Choose a different precision among"):
        _precision_of({"precision": "16-mixed"})  # Lightning's own sentence
    with pytest.raises(ValueError, match="brings its own precision plugin"):
        _precision_of({"plugins": [type("Mine", (Precision,), {})()]})


def test_a_wrong_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision=fp8 is not known; legal: 64-true, 32-true, bf16-true"):
        HelixStrategy(Grid(1, 1), precision="fp8")
    with pytest.raises(ValueError, match="only 16-mixed scales the loss, not bf16-mixed"):
        HelixPrecision("bf16-mixed", LossScaler())


def test_lbfgs_cannot_be_scaled() -> None:
    optimizer = torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="does not go together with LBFGS"):
        HelixPrecision("16-mixed", LossScaler()).optimizer_step(optimizer, Lit(DENSE), lambda: None)
