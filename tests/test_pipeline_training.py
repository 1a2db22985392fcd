"""Training by PyTorch's tensor parallelism and pipeline stages: what a step does is what one device's does."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import each_on_ranks, make_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import on_ranks
from test_train import MOE, configured
from torch import Tensor
from torch.distributed.tensor import DTensor

from helix.checkpoint.save_and_load import load, save
from helix.checkpoint.whole import Whole, state_tensors, wholes
from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.config.schema import ConfigError, to_grid
from helix.config.train_schema import TrainConfig
from helix.models.transformer import Transformer
from helix.parallel.methods.method import Job, Layout
from helix.parallel.pipeline import Pipeline, Stream
from helix.parallel.precision import HelixPrecision
from helix.parallel.strategy import HelixStrategy
from helix.parallel.tensor_parallel import tensor_part
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.study.text import TrainingText
from helix.training.learner import LanguageModel, TrainingBatches, make_optimizer
from helix.training.run import resolve

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
# 3 layers on 2 stages; a step of two batches, clipped.
FIT = ["model.layers=3", "model.qk_norm=true", "trainer.max_steps=1", "optimizer.warmup_steps=1",
       "trainer.accumulate_grad_batches=2", "parallel.microbatches=2"]  # fmt: skip
LAYOUTS = {
    "tp2_sp_pp2": ["parallel=tp2_pp2", "parallel.residual=sharded"],
    "tp2_dp2": ["parallel=tp2_pp2", "parallel.stage=1", "parallel.data=2"],
    "tp1_pp2_dp2": ["parallel=tp2_pp2", "parallel.n=1", "parallel.data=2"],
    "tp1_pp2_dp2, sharded": ["parallel=tp2_pp2", "parallel.n=1", "parallel.data=2", "parallel.shard_data=true"],
}
OF_EXPERTS = {"tp2_pp2": ["parallel=tp2_pp2"]}


class Gradients(Callback):
    """Global norms, and the gradients that the optimizer has taken, whole, by their names on every layout."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if len(self.steps) == trainer.global_step:
            return  # gradients were accumulated
        assert isinstance(trainer.precision_plugin, HelixPrecision)
        assert trainer.precision_plugin.gradient_norm is not None
        self.norms.append(float(trainer.precision_plugin.gradient_norm))
        self.steps.append({name: _gradient(each) for name, each in wholes(module).items()})


def _gradient(whole: Whole) -> Tensor:
    gradients = [part.grad for part in whole.parts if part.grad is not None]
    return _full(whole.gather(gradients)).clone()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _trainer(one: TrainConfig, *callbacks: Any) -> Trainer:
    parallel = one.parallel
    strategy = HelixStrategy(
        to_grid(parallel), parallel.data, parallel.stage, one.precision, shard_data=parallel.shard_data
    )
    return make_trainer(
        strategy, parallel.ranks, *callbacks, max_steps=one.trainer.max_steps, gradient_clip_val=0.1,
        accumulate_grad_batches=one.trainer.accumulate_grad_batches, use_distributed_sampler=False,
    )  # fmt: skip


def _fit(one: TrainConfig) -> tuple[list[float], list[float], list[dict[str, Tensor]]]:
    """Losses of the batches, global norms and clipped gradients of the steps."""
    module, watch = LanguageModel(one, resolve(one)), Gradients()
    text = TrainingText(bytes(range(256)) * 200, one.data.batch_size, one.data.seq_len, seed=0)
    _trainer(one, watch).fit(module, TrainingBatches(text, module))
    return [float(loss) for loss in module.losses], watch.norms, watch.steps


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_losses_gradients_and_their_norm_are_the_single_devices(kind: str) -> None:
    more = [*FIT, "precision=64-true", *(MOE if kind == "moe" else [])]
    losses, norms, (expected,) = on_ranks(1, _fit, configured("parallel=single", *more))[0]
    assert norms[0] > 0.1  # so that it is clipped
    # fp64, sums in another order; the experts' router is fp32, and is in the norm that everything is clipped by.
    tolerance = 1e-6 if kind == "moe" else 1e-10
    layouts = OF_EXPERTS if kind == "moe" else LAYOUTS
    cases = [(configured(*layout, *more),) for layout in layouts.values()]
    for name, ranks in zip(layouts, each_on_ranks(4, _fit, cases), strict=True):
        replicas = 2 if "dp2" in name else 1
        of_replicas = [ranks[i * 4 // replicas][0] for i in range(replicas)]
        np.testing.assert_allclose(np.mean(of_replicas, 0), losses, rtol=tolerance)
        assert {key for _, _, (gradients,) in ranks for key in gradients} == expected.keys()
        for rank, (own, own_norms, (gradients,)) in enumerate(ranks):
            assert own == of_replicas[rank * replicas // 4]  # also on the stages that do not compute the loss
            np.testing.assert_allclose(own_norms, norms, rtol=tolerance)
            for key, value in gradients.items():
                atol = tolerance * float(expected[key].abs().max())
                torch.testing.assert_close(value, expected[key], rtol=0, atol=atol, msg=f"{name} {key}")


def _overflown(one: TrainConfig) -> tuple[float, bool]:
    """The head's gradient, which only the last stage has, overflows: is the first stage's step skipped too?"""
    module = LanguageModel(one, resolve(one))
    trainer = _trainer(one)
    text = TrainingText(bytes(range(256)) * 200, one.data.batch_size, one.data.seq_len, seed=0)
    configure = module.configure_model

    def configure_model() -> None:
        configure()
        assert isinstance(module.model, torch.nn.Module)
        for name, weight in module.model.named_parameters():
            before[name] = weight.detach().clone()
            if name == "head.weight":
                weight.register_hook(lambda gradient: gradient * float("inf"))

    before: dict[str, Tensor] = {}
    module.configure_model = configure_model  # type: ignore[method-assign]
    trainer.fit(module, TrainingBatches(text, module))
    assert isinstance(trainer.precision_plugin, HelixPrecision)
    assert trainer.precision_plugin.scaler is not None
    same = all(torch.equal(weight, before[name]) for name, weight in module.model.named_parameters())
    return trainer.precision_plugin.scaler.value, same


# That the schedule steps where the first optimizer step is skipped has torch warn, which would be an error here.
def test_an_overflow_on_one_stage_has_all_stages_skip_the_step() -> None:
    one = configured("parallel=tp2_pp2", "parallel.n=1", "precision=16-mixed", "trainer.max_steps=2")
    assert on_ranks(2, _overflown, one) == [(2.0**14, True)] * 2


def _pipelined(microbatches: int) -> tuple[dict[str, int], bool]:
    mesh = Mesh(Grid(1, 1), stage=2)
    weight = torch.full((3,), 2.0, requires_grad=True)

    def part(x: Tensor, targets: Tensor) -> Tensor:
        if mesh.stage.rank == 0:
            return x[..., None] * weight
        return ((x * weight).sum(-1) - targets).flatten()

    pipeline = Pipeline(part, Stream(3, 1, torch.float32), mesh.stage, microbatches)
    tokens, targets = torch.arange(8.0).view(4, 2), torch.ones(4, 2)
    with record() as log:
        losses, balance = pipeline(tokens, targets)
        (losses * torch.arange(8.0)).sum().backward()
    assert balance is None
    assert torch.equal(losses, tokens.flatten() * 12 - 1)
    assert weight.grad is not None
    return dict(log.bytes), torch.equal(weight.grad, torch.full((3,), 2.0 * 140))  # 140: 0 + 1 + 4 + .. + 49


def test_what_stages_send_is_the_stream_and_its_gradient() -> None:
    stream = 4 * 2 * 3 * 4  # [B, T, E] in fp32
    for ranks in each_on_ranks(2, _pipelined, [(1,), (4,)]):
        for rank, (sent, right) in enumerate(ranks):
            assert right
            of_stage = {"send/pipeline.grad" if rank else "send/pipeline": stream}
            assert {name: nbytes for name, nbytes in sent.items() if nbytes} == {
                "all_reduce/pipeline.losses": 8 * 4, **of_stage
            }  # fmt: skip


def _broken() -> None:
    mesh = Mesh(Grid(1, 1), stage=2)
    weight = torch.ones(3, requires_grad=True)

    def part(x: Tensor, targets: Tensor) -> Tensor:
        if mesh.stage.rank == 1:
            raise ArithmeticError("the last stage broke")
        return x[..., None] * weight

    losses, _ = Pipeline(part, Stream(3, 1, torch.float32), mesh.stage, 2)(torch.ones(4, 2), torch.ones(4, 2))
    losses.sum().backward()


def test_an_error_on_one_stage_ends_all() -> None:
    began = time.monotonic()
    with pytest.raises(ArithmeticError, match="the last stage broke"):
        on_ranks(2, _broken, timeout_s=60)
    assert time.monotonic() - began < 30


SAVED = TransformerShape(2, 32, heads=4, kv_heads=2, head_dim=8, mlp_hidden=10, vocab=6, qk_norm=True)


def _made(parallel: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    grid = Grid(1, 2) if parallel == "tp2_pp2" else Grid(2, 2)
    stage = 4 // grid.ranks
    mesh = Mesh(grid, stage=stage)
    if stage == 1:
        model: Any = Transformer(SAVED, mesh, AttentionOptions())
        model.init_weights(seed)
    else:
        layout = Layout(grid, stage=stage, options=AttentionOptions(residual="replicated"), microbatches=1)
        model = tensor_part(Job(SAVED, 1, 4, torch.float32, torch.device("cpu"), seed), layout, mesh)
    return model, make_optimizer(model, configured().optimizer)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """With gradients that depend on the weights alone, so that they are right on every layout."""
    for weight in model.parameters():
        weight.grad = (weight.detach() * 3 + 0.5).clone()
    optimizer.step()


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every whole tensor of this rank's stage, by name."""
    found = wholes(model)
    tensors = {name: each.gather(each.parts) for name, each in found.items()} | state_tensors(found, optimizer)
    return {name: _full(tensor).clone() for name, tensor in tensors.items()}


def _across(folder: Path) -> list[dict[str, Tensor]]:
    """From a pipeline to a grid, one more step there, and back: what was saved and loaded each time."""
    found = []
    model, optimizer = _made("tp2_pp2", 0)
    for seed, parallel in enumerate(("helix_2x2", "tp2_pp2"), 1):
        _step(model, optimizer)
        save(folder, model, [optimizer], step=seed)
        found.append(_tensors(model, optimizer))
        model, optimizer = _made(parallel, seed)
        load(folder, model, [optimizer])
        found.append(_tensors(model, optimizer))
    return found


def test_a_pipelines_checkpoint_loads_on_a_grid_and_back(tmp_path: Path) -> None:
    ranks = on_ranks(4, _across, tmp_path)
    of_stages, of_grid, before, after = zip(*ranks, strict=True)
    assert "blocks.1.mlp.up" not in of_stages[0].keys() | after[0].keys()  # the first stage's
    assert "optimizer/exp_avg/blocks.1.attention.wo" in of_grid[0].keys() & of_stages[3].keys()
    # A rank of the grid has all names; the ranks of a stage have its own, each of them the whole tensors.
    for saved, loaded in ((of_grid[0], of_stages), (before[0], after)):
        assert saved.keys() == {name for own in loaded for name in own}
        assert not [name for own in loaded for name, value in own.items() if not torch.equal(value, saved[name])]
    assert not torch.equal(of_grid[0]["head.weight"], before[0]["head.weight"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel=tp16"], "tensor parallelism over 16 ranks needs whole heads, and heads is 4; legal: [1, 2, 4]"),
        (["parallel.microbatches=3"], "parallel.microbatches=3 does not divide the 4 samples of a replica; legal: "),
        (["parallel.stage=3"], "3 pipeline stages need as many layers, not 2"),
        (["parallel.data=3"], "parallel.data=3 does not divide data.batch_size=4"),
        (["parallel.residual=sharded", "data.seq_len=25"], "a stream cut over 2 ranks needs a length"),
        (["parallel.schedule=perslice"], "parallel.method=tensor has no parallel.schedule=perslice; choose auto, or"),
        (["parallel.m=2"], "parallel.method=tensor has no feature slices"),
    ],
)
def test_what_tensor_parallelism_cannot_train_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises((ConfigError, PartitionError), match=re.escape(said)):
        configured("parallel=tp2_pp2", *overrides)
