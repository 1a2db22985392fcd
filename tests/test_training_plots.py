"""What a training and a sweep of trainings leave: settings over seeds, tables, pictures; the experiments."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fitting import each_on_ranks
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from helix.command.compose import prepare, typed
from helix.command.sweep import FAILED, SweepJob, keep
from helix.config.methods import to_name
from helix.config.schema import digest
from helix.config.train_schema import TrainConfig, check_training
from helix.figures.style import save
from helix.study.report import MethodLabel, Schedules, plain
from helix.study.text import corpus
from helix.study.tracking import Tracker
from helix.training.compare import difference, final_bpb, loss_gaps, settings_of
from helix.training.learner import lr_factor
from helix.training.plots import draw_run, draw_settings, losses, settings_from
from helix.training.report import TrainReport, Validation, draw, write
from helix.training.resuming import begin
from helix.training.run import train
from helix.training.sweep import collect

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment/train").glob("*.yaml"))
SMALL = [
    "model.layers=1", "model.width=32", "model.heads=4", "model.head_dim=8", "model.mlp_hidden=48", "data.seq_len=16",
    "data.batch_size=4", "data.validation_batches=1", "data.limit_bytes=200000", "trainer.max_steps=5",
    "trainer.log_every_n_steps=2", "optimizer.warmup_steps=2", "logger=none", "parallel=single",
]  # fmt: skip


def configured(*overrides: str) -> TrainConfig:
    prepare(name="train", schema=TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        one: TrainConfig = typed(compose("train", list(overrides)), ROOT / "conf")
    return one


def a_report(
    settings: TrainConfig, losses: Sequence[float], bpb: float, norms: bool = True, skipped: Sequence[int] = ()
) -> TrainReport:
    steps = len(losses)
    scales = [2.0**16] * steps if settings.precision == "16-mixed" else [None] * steps
    return TrainReport(
        method=MethodLabel(to_name(settings.parallel), 2, 2, Schedules("heads")), world_size=4,
        started_at="2026-11-22T12:00:00+00:00", steps=steps, losses=list(losses),
        learning_rates=[1e-3] * steps, gradient_norms=[1.5 if norms else None] * steps, loss_scales=scales,
        skipped_steps=list(skipped), validations=[Validation(steps // 2, bpb + 1), Validation(steps, bpb)],
        validation_bpb=bpb, unigram_entropy_bpb=4.75, text="a text", text_bytes=10**6, tokens_per_s=1e4, wall_s=10,
        parameters=10**6, model={"name": settings.model.name}, data={"batch_size": 16, "seq_len": 128}, optimizer={},
        trainer={"accumulate_grad_batches": 1, "gradient_clip_val": 1.0 if norms else None}, auxiliary_weight=0,
        precision=settings.precision, seed=settings.seed, settings=digest(settings), git_commit="0123456789",
    )  # fmt: skip


def a_sweep(
    folder: Path, keys: dict[str, Sequence[str]], bpb: dict[tuple[str, ...], float], *fixed: str
) -> list[SweepJob]:
    """Jobs of every combination; those in `bpb` are done, and their losses are those bits for 6 steps, in nats."""
    jobs = []
    for number, values in enumerate(itertools.product(*keys.values())):
        overrides = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        job = SweepJob(number, overrides, configured(*fixed, *overrides), folder / str(number))
        if values in bpb:
            losses = [bpb[values] * math.log(2) + 1 / (step + 1) for step in range(6)]
            assert isinstance(job.settings, TrainConfig)
            write(a_report(job.settings, losses, bpb[values]), job.folder / TrainConfig.REPORT)
        jobs.append(job)
    return jobs


SCHEDULES = {"parallel.schedule": ("auto", "perslice"), "seed": ("0", "1", "2")}
FINAL = {
    ("auto", "0"): 3.0, ("auto", "1"): 3.25, ("auto", "2"): 2.75,
    ("perslice", "0"): 3.1, ("perslice", "1"): 3.375, ("perslice", "2"): 2.9,
}  # fmt: skip


def test_settings_are_held_against_the_first_over_seeds(tmp_path: Path) -> None:
    exact, sliced = settings_of(a_sweep(tmp_path, SCHEDULES, FINAL))
    assert (exact.label, sliced.label) == ("helix_2x2", "helix_2x2_perslice")
    assert (exact.reference, exact.pairs, loss_gaps(exact)) == (None, [], None)
    assert sliced.reference is exact
    reached, above = final_bpb(exact), difference(sliced)
    values = [FINAL["auto", seed] for seed in SCHEDULES["seed"]]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (reached.runs, reached.mean, reached.low, reached.high) == pytest.approx((3, 3.0, low, high))
    paired = stats.ttest_rel([FINAL["perslice", seed] for seed in SCHEDULES["seed"]], values)
    interval = paired.confidence_interval(0.95)
    assert (above.runs, above.mean) == (3, pytest.approx(0.125))
    assert (above.low, above.high) == pytest.approx((interval.low, interval.high))
    gaps = loss_gaps(sliced)
    assert gaps is not None
    assert gaps.shape == (3, 6)
    assert gaps.max() == pytest.approx(0.15 * math.log(2))


def test_the_first_key_that_varies_is_compared_at_equal_others(tmp_path: Path) -> None:
    keys = {"parallel": ("single", "helix_2x2", "helix_4x1"), "model": ("tiny", "tiny_moe")}
    done = {(grid, model): 3.0 + number for number, (grid, model) in enumerate(itertools.product(*keys.values()))}
    del done["single", "tiny_moe"]
    settings = settings_of(a_sweep(tmp_path, keys, done))
    against = {one.label: one.reference.label if one.reference else None for one in settings}
    assert against == {
        "single model=tiny": None,
        "single model=tiny_moe": None,
        "helix_2x2 model=tiny": "single model=tiny",
        "helix_2x2 model=tiny_moe": "single model=tiny_moe",
        "helix_4x1 model=tiny": "single model=tiny",
        "helix_4x1 model=tiny_moe": "single model=tiny_moe",
    }
    assert [len(one.pairs) for one in settings] == [0, 0, 1, 0, 1, 0]  # one reference did not end
    one_seed = difference(settings[2])
    assert (one_seed.runs, one_seed.mean) == (1, 2.0)
    assert math.isnan(one_seed.low)


def collected(folder: Path, jobs: list[SweepJob]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    collect(folder, jobs, console)
    return console.export_text()


def test_a_sweep_leaves_tables_and_a_picture(tmp_path: Path) -> None:
    done = {values: bits for values, bits in FINAL.items() if values != ("perslice", "2")}
    jobs = a_sweep(tmp_path, SCHEDULES, done)
    jobs[5].folder.mkdir(parents=True, exist_ok=True)
    keep(jobs[5].folder, FAILED, reason="RuntimeError: no", traceback="")
    text = collected(tmp_path, jobs)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "helix_2x2 3 3.0000 2.3790..3.6210 10,000" in lines
    assert "helix_2x2_perslice 2 +0.1125 -0.0463..+0.2713 8.7e-02" in lines
    assert "1 of 6 jobs failed:" in lines
    assert "skipped" not in text
    sweep, settings = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("sweep", "settings"))
    assert list(sweep["status"]) == ["done"] * 5 + ["failed"]
    assert list(sweep["validation_bpb"][:5]) == list(done.values())
    assert list(settings["difference"])[1] == pytest.approx(0.1125)
    assert list(settings["pairs"]) == [0, 2]
    assert pd.read_parquet(tmp_path / "settings.parquet").shape == settings.shape
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_in_16_mixed_the_table_has_the_loss_scale(tmp_path: Path) -> None:
    keys = {"trainer.scaling": ("ordinary", "adaptive")}
    jobs = a_sweep(tmp_path, keys, {("ordinary",): 3.0, ("adaptive",): 3.5}, "precision=16-mixed")
    one = jobs[1].settings
    assert isinstance(one, TrainConfig)
    write(a_report(one, [4.0] * 6, 3.5, skipped=[1, 2]), jobs[1].folder / TrainConfig.REPORT)
    lines = [" ".join(line.split()) for line in collected(tmp_path, jobs).splitlines()]
    assert any(line.endswith("3.0000 - 10,000 0 2^16") for line in lines)
    assert any(line.endswith("3.5000 - 10,000 2 2^16") for line in lines)


def test_a_sweep_without_a_figure_still_ends(tmp_path: Path) -> None:
    """Nothing ended; and what ended had diverged, whose loss is null in JSON."""
    assert "2 of 2 jobs not measured" in collected(tmp_path, a_sweep(tmp_path, {"seed": ("0", "1")}, {}))
    jobs = a_sweep(tmp_path / "more", SCHEDULES, FINAL | {("perslice", "1"): math.nan})
    assert "nan" in collected(tmp_path / "more", jobs)
    assert math.isnan(difference(settings_of(jobs)[1]).low)


def _words(chart: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in chart.axes]


def test_the_picture_of_a_sweep(tmp_path: Path) -> None:
    chart = draw_settings(settings_of(a_sweep(tmp_path, SCHEDULES, FINAL)))
    chart.draw_without_rendering()
    assert _words(chart) == [
        "Training loss, bits per byte",
        "Validation, bits per byte",
        "Validation above helix_2x2's, bits per byte",
    ]
    names = [text.get_text() for text in chart.legends[0].get_texts()]
    assert names == ["helix_2x2", "helix_2x2_perslice"]
    # Of each setting a line for each seed and their mean, which the band goes with.
    for axes, settings in zip(chart.axes, (2, 2, 1), strict=True):
        assert len([line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_linewidth() < 0.9]) == (
            3 * settings
        )
        assert len(axes.collections) == settings
    assert len({line.get_color() for line in chart.axes[0].lines}) == 2
    assert chart.get_supxlabel().startswith("model tiny (1 M parameters); steps of 16 x 128 tokens of a text; 32-true")
    legend = chart.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in chart.axes)


def test_settings_that_compute_the_same_are_drawn_by_their_distance(tmp_path: Path) -> None:
    keys = {"parallel": ("single", "helix_2x2")}
    chart = draw_settings(settings_of(a_sweep(tmp_path, keys, {("single",): 3.0, ("helix_2x2",): 3.0 + 1e-5})))
    assert "largest distance so far to that of single, nats a token" in _words(chart)[2]
    (line,) = chart.axes[2].lines
    assert np.asarray(line.get_ydata()) == pytest.approx(np.full(6, 1e-5 * math.log(2)))
    assert chart.axes[2].get_yscale() == "log"


@pytest.mark.parametrize("bpb", [3.0 + 1e-5, 3.5])
def test_a_sweep_is_drawn_again_from_its_losses(bpb: float, tmp_path: Path) -> None:
    settings = settings_of(
        a_sweep(tmp_path, {"parallel": ("single", "helix_2x2")}, {("single",): 3.0, ("helix_2x2",): bpb})
    )
    losses(settings).to_csv(tmp_path / "losses.csv", index=False)
    stored = settings_from(pd.read_csv(tmp_path / "losses.csv"))
    first, again = (
        save(draw_settings(each, "two cores"), tmp_path / name)
        for each, name in ((settings, "first.png"), (stored, "again.png"))
    )
    assert first.read_bytes() == again.read_bytes()


def test_the_picture_of_a_run_shows_what_was_recorded(tmp_path: Path) -> None:
    losses = [4 - step / 50 for step in range(100)]
    free = a_report(configured(), losses, 3.0, norms=False)
    assert _words(draw_run(plain(free))) == ["Loss, bits per byte", "Learning rate"]
    scaled = a_report(configured("precision=16-mixed"), losses, 3.0, skipped=[3, 9])
    chart = draw_run(plain(scaled))
    assert _words(chart)[2:] == ["Gradient norm\nclipped above 1 (dashed)", "Loss scale\nskipped steps: 2 (crosses)"]
    smooth = chart.axes[0].lines[1]
    assert smooth.get_label() == "training (mean of 2 steps)"
    assert smooth.get_xdata()[0] == 2
    assert smooth.get_ydata()[0] == pytest.approx((losses[0] + losses[1]) / 2 / math.log(2))
    assert draw(free, tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def _curves(one: TrainConfig, run_dir: Path) -> dict[str, list[float]]:
    text = corpus(None, one.data.limit_bytes)
    return dict(train(one, "cpu", text, Tracker(None, None), begin(one, run_dir)).curves.state_dict())


def test_every_step_leaves_its_learning_rate_norm_and_scale(tmp_path: Path) -> None:
    plain_one = configured(*SMALL, "trainer.gradient_clip_val=null")
    scaled = configured(*SMALL, "precision=16-mixed")
    (free,), (mixed,) = each_on_ranks(1, _curves, [(plain_one, tmp_path), (scaled, tmp_path)])
    expected = [plain_one.optimizer.lr * lr_factor(step, 5, plain_one.optimizer) for step in range(5)]
    assert free["learning_rates"] == mixed["learning_rates"] == pytest.approx(expected)
    assert (free["gradient_norms"], free["loss_scales"], free["skipped_steps"]) == ([None] * 5, [None] * 5, [])
    assert len(mixed["gradient_norms"]) == len(mixed["loss_scales"]) == len(mixed["losses"]) == 5
    assert min(mixed["gradient_norms"]) > 0
    assert mixed["loss_scales"][-1] == 2.0 ** (16 - len(mixed["skipped_steps"]))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_trains_here(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIX_MAX_RANKS", "16")
    prepare(name="train", schema=TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"experiment=train/{experiment}"], return_hydra_config=True)
    params = {key: str(values).split(",") for key, values in cfg.hydra.sweeper.params.items()}
    for values in itertools.product(*params.values()):
        overrides = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        check_training(configured(f"experiment=train/{experiment}", *overrides))
    assert f"train/{experiment}" in (ROOT / "conf/train.yaml").read_text()  # which --help shows


@pytest.mark.parametrize(
    ("command", "experiment", "said"),
    [
        ("infer", "train/grids", "sets data, which this command does not have; conf/experiment/train/ is train.py's"),
        ("train", "more_slices", "sets baseline, which this command does not have; conf/experiment/train/ is"),
        ("train", "train/grid", "(did you mean train/grids?); choose one of: experiment=beyond_kv_heads"),
    ],
)
def test_the_other_commands_experiments_are_refused(command: str, experiment: str, said: str) -> None:
    line = [sys.executable, f"{command}.py", f"experiment={experiment}"]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{command}.py: error: ")
    assert f"experiment={experiment} {said}" in ended.stderr
    assert ended.stderr.count("\n") == 1
