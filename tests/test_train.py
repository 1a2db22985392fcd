"""Training: the same curve on every grid, and what is refused."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from ranks import on_ranks
from rich.console import Console

from helix.checkpoint import manifest as files
from helix.checkpoint.asked import check_resumed_training
from helix.checkpoint.content import About, Manifest
from helix.checkpoint.manifest import checkpoints
from helix.command.compose import prepare, typed
from helix.config.check import check_values
from helix.config.schema import ConfigError, Misfit
from helix.config.train_schema import OptimizerConfig, TrainConfig, check_enough
from helix.partition.grid import PartitionError
from helix.study.report import MethodLabel, Schedules
from helix.study.text import TrainingText, corpus
from helix.study.tracking import Tracker
from helix.training.learner import lr_factor
from helix.training.report import TrainReport, Validation, render
from helix.training.resuming import begin
from helix.training.run import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.layers=2", "model.width=32", "model.heads=4", "model.head_dim=8", "model.mlp_hidden=48", "data.seq_len=24",
    "data.batch_size=4", "data.validation_batches=2", "data.limit_bytes=200000", "trainer.max_steps=8",
    "trainer.validate_every_n_steps=5", "trainer.log_every_n_steps=3", "optimizer.warmup_steps=2", "logger=none",
]  # fmt: skip
MOE = ["model.kind=moe", "model.experts=4", "model.top_k=2"]
Curve = tuple[list[float], list[tuple[int, float]], int]


def configured(*overrides: str) -> TrainConfig:
    prepare(name="train", schema=TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        one: TrainConfig = typed(compose("train", [*SMALL, *overrides]), ROOT / "conf")
    check_resumed_training(one)
    return one


def _train(one: TrainConfig, run_dir: Path) -> Curve:
    trained = train(one, "cpu", corpus(None, one.data.limit_bytes), Tracker(None, None), begin(one, run_dir))
    module, curves = trained.module, trained.curves
    assert curves.batches < 2 or curves.tokens_per_s > 0  # the first batch is not timed
    return curves.losses, curves.validations, module.data_position


def curve(*overrides: str, run_dir: Path = Path("unused")) -> Curve:
    """Losses by step, validations and the batches seen, which all ranks agree on."""
    one = configured(*overrides)
    results = on_ranks(one.parallel.ranks, _train, one, run_dir)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_losses_are_the_same_on_every_grid(kind: str) -> None:
    more = MOE if kind == "moe" else []
    losses, validations, batches = curve("parallel=single", *more)
    assert (len(losses), batches) == (8, 8)
    assert [step for step, _ in validations] == [5, 8]
    assert losses[-1] < losses[0] - 0.1
    grids = [["parallel=helix_2x2"], ["parallel=helix_2x1", "parallel.data=2"]]
    for grid in [*grids, *([["parallel=tp2_pp2"]] if kind == "dense" else [])]:
        found, checked, _ = curve(*grid, *more)
        # fp32 sums in another order, amplified by eight steps of Adam.
        np.testing.assert_allclose(found, losses, rtol=0, atol=1e-4)
        np.testing.assert_allclose([bits for _, bits in checked], [bits for _, bits in validations], atol=2e-4)


def test_perslice_trains_another_function() -> None:
    exact, _, _ = curve("parallel=helix_2x1")
    sliced, _, _ = curve("parallel=helix_2x1", "parallel.schedule=perslice")
    assert sliced[-1] < sliced[0] - 0.1
    assert abs(sliced[0] - exact[0]) > 1e-4  # from the first step on, with the same weights


def test_accumulated_halves_are_the_whole_batch() -> None:
    whole = curve("parallel=helix_2x1", "precision=64-true")
    half = curve(
        "parallel=helix_2x1", "precision=64-true", "data.batch_size=2", "trainer.accumulate_grad_batches=2",
        "data.validation_batches=4",
    )  # fmt: skip
    np.testing.assert_allclose(half[0], whole[0], rtol=0, atol=1e-10)
    assert [step for step, _ in half[1]] == [step for step, _ in whole[1]]
    assert (half[2], whole[2]) == (16, 8)


@pytest.mark.usefixtures("deepspeed")
def test_clipping_and_the_auxiliary_loss_change_what_is_learnt() -> None:
    free, _, _ = curve("parallel=helix_2x1", "trainer.gradient_clip_val=null", "optimizer=sgd", *MOE)
    clipped, _, _ = curve("parallel=helix_2x1", "trainer.gradient_clip_val=0.01", "optimizer=sgd", *MOE)
    unbalanced, _, _ = curve(
        "parallel=helix_2x1", "trainer.gradient_clip_val=null", "optimizer=sgd", *MOE, "auxiliary_weight=0"
    )
    assert clipped[-1] > free[-1] + 0.01
    # The balancing loss is no part of the first reported loss, and of every later one through the weights.
    assert unbalanced[0] == free[0]
    assert unbalanced[-1] != free[-1]


SAVED = ["trainer.save_every_n_steps=4", "trainer.validate_every_n_steps=4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, Path]:
    """A training's `curve`, and its checkpoint of the step in its middle."""
    folder = tmp_path_factory.mktemp("saved")
    whole = curve("parallel=helix_2x1", *SAVED, run_dir=folder)
    return whole, checkpoints(folder / "checkpoints")[0]


def _train_otherwise(one: TrainConfig, run_dir: Path) -> tuple[list[float], list[float], dict[str, Any]]:
    trained = train(one, "cpu", corpus(None, one.data.limit_bytes), Tracker(None, None), begin(one, run_dir))
    group = trained.module.trainer.optimizers[0].param_groups[-1]
    return trained.curves.losses, trained.curves.learning_rates, {key: group[key] for key in ("betas", "initial_lr")}


def test_a_training_goes_on_where_it_was_saved(saved: tuple[Curve, Path], tmp_path: Path) -> None:
    """On the same grid as if it had never stopped; on another one to within the order of sums.

    With another learning rate, another end and another precision, by what is configured then.
    """
    whole, middle = saved
    assert middle.name.endswith("step-4")
    assert curve("parallel=helix_2x1", *SAVED, f"ckpt={middle}", run_dir=tmp_path / "same") == whole
    same = configured("parallel=single", *SAVED, f"ckpt={middle}")
    changed = ["precision=64-true", "optimizer.lr=0.01", "optimizer.beta1=0.8", "trainer.max_steps=6"]
    other = configured("parallel=single", *SAVED, f"ckpt={middle}", *changed)
    (((losses, _, batches), (others, rates, options)),) = on_ranks(
        1, lambda: (_train(same, tmp_path / "single"), _train_otherwise(other, tmp_path / "other"))
    )
    assert losses[:4] == whole[0][:4]
    np.testing.assert_allclose(losses, whole[0], rtol=0, atol=1e-4)
    assert batches == 8
    assert rates[4:] == [0.01 * lr_factor(step, 6, other.optimizer) for step in (4, 5)]
    assert options == {"betas": (0.8, 0.95), "initial_lr": 0.01}
    assert others[4] == pytest.approx(losses[4], abs=1e-4)  # before the first other step
    assert len(others) == 6


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.batch_size=2", "trainer.accumulate_grad_batches=2"],
         "was trained with data.batch_size=4 trainer.accumulate_grad_batches=1, and a step would see other tokens "
         "here; set data.batch_size=4 trainer.accumulate_grad_batches=1"),
        (["seed=1"], "set seed=0"),
        (["data.path=tests"], "set data.path=null"),
        (["optimizer=sgd"], "has the state of adamw, and optimizer.name=sgd here; set optimizer=adamw"),
        (["trainer.max_steps=4"], "has 4 steps behind it, and trainer.max_steps=4 counts these; set a larger"),
        (["parallel=single", "parallel.aggregate=concat"], "set parallel.aggregate=project"),
    ],
)  # fmt: skip
def test_what_the_training_was_not_is_refused(overrides: list[str], said: str, saved: tuple[Curve, Path]) -> None:
    with pytest.raises(Misfit, match=re.escape(said)):
        configured(*SAVED, f"ckpt={saved[1]}", *overrides)


def test_what_is_no_training_or_has_no_time_left_is_refused(tmp_path: Path) -> None:
    files.write(Manifest({}, {}, About()), tmp_path)
    with pytest.raises(Misfit, match="holds weights alone, and no training to go on from; give"):
        configured(f"ckpt={tmp_path}")
    extra = {"loops": {}, "callbacks": {"Timer": {"time_elapsed": {"train": 90.4}}}}
    files.write(Manifest({}, {}, About(2, extra, [{"type": "AdamW", "groups": []}])), tmp_path)
    configured(f"ckpt={tmp_path}", "trainer.max_time=00:00:01:31")
    with pytest.raises(Misfit, match=r"has 90 s of training behind it, and trainer\.max_time=00:00:01:30 counts"):
        configured(f"ckpt={tmp_path}", "trainer.max_time=00:00:01:30")


def test_time_ends_a_training_with_a_validation() -> None:
    losses, validations, _ = curve(
        "parallel=single", "trainer.max_steps=100000", "trainer.max_time=00:00:00:01", "optimizer.warmup_steps=0"
    )
    assert 0 < len(losses) < 100000
    assert validations[-1][0] == len(losses)


def test_the_learning_rate_rises_and_falls() -> None:
    config = OptimizerConfig(lr=1.0, weight_decay=0.0, warmup_steps=4, final_lr_ratio=0.1)
    factors = [lr_factor(step, 20, config) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[12] == pytest.approx(0.55)
    assert factors[20] == pytest.approx(0.1)
    assert lr_factor(12, 20, OptimizerConfig(lr=1.0, warmup_steps=4, decay="none", final_lr_ratio=0.1)) == 1.0
    assert lr_factor(0, 1, OptimizerConfig(lr=1.0, warmup_steps=0, final_lr_ratio=0.1)) == 1.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.name=lion", "optimizer.name cannot be 'lion'; choose one of: adamw, sgd"),
        ("optimizer.lr=0", "optimizer.lr must be above 0, not 0"),
        ("optimizer.lr=nan", "optimizer.lr must be above 0, not nan"),
        ("optimizer.beta2=1", "optimizer.beta2 must be below 1, not 1"),
        ("optimizer.final_lr_ratio=1.5", "optimizer.final_lr_ratio must be at most 1, not 1.5"),
        ("optimizer.warmup_steps=9", "optimizer.warmup_steps=9 is more than trainer.max_steps=8; choose at most"),
        ("trainer.max_steps=0", "trainer.max_steps must be at least 1, not 0"),
        ("trainer.max_time=90", "trainer.max_time takes DD:HH:MM:SS, such as 00:00:01:30"),
        ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val must be above 0, not 0"),
        ("data.held_out_every=1", "data.held_out_every must be at least 2, not 1"),
        ("data.path=/nowhere", "data.path=/nowhere does not exist; data.path takes"),
        ("parallel.data=3", "parallel.data=3 does not divide data.batch_size=4; legal parallel.data: [1, 2, 4]"),
        ("parallel.stage=2", "parallel.method=helix has no pipeline stages, so parallel.stage must be 1"),
        ("parallel.n=3", "n=3 does not divide heads=4"),
        ("model.experts=4", "model.kind=dense has no experts"),
        ("precision=8", "precision cannot be '8'; choose one of: 64-true"),
        ("auxiliary_weight=-1", "auxiliary_weight must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_trained_is_refused(override: str, said: str) -> None:
    with pytest.raises((ConfigError, PartitionError), match=re.escape(said)):
        configured(override)


def test_a_text_too_short_to_hold_out_a_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 1000)
    with pytest.raises(ConfigError, match=r"the text has 1000 bytes, .* takes 2000; take a longer text"):
        configured(f"data.path={path}")
    one = configured()
    check_values(one)
    check_enough(one.data, 2000)
    TrainingText(bytes(2000), 4, 24, 0).validation(1)


def test_the_table_fits_80_columns() -> None:
    report = TrainReport(
        method=MethodLabel("helix_2x2", 2, 2, Schedules("heads"), data=2), world_size=8, started_at="now", steps=4,
        losses=[3.0, 2.0, 2.0, 1.0], validations=[Validation(2, 3.5), Validation(4, 3.0)], validation_bpb=3.0,
        unigram_entropy_bpb=4.75, text="a text", text_bytes=10**6, tokens_per_s=1e4, wall_s=10, parameters=10**6,
        model={"name": "tiny"}, data={"batch_size": 8, "seq_len": 16}, optimizer={},
        trainer={"accumulate_grad_batches": 2}, auxiliary_weight=0, precision="32-true", seed=0, settings="0" * 12,
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    assert "steps of 16 x 16 tokens" in text
    assert "3.000 bits per byte on held-out text, 1.750 below the text's unigram entropy" in " ".join(text.split())
    assert "3.607" in text  # mean of 3 and 2 nats
