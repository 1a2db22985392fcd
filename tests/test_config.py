"""Every config composes into the typed schema, the papers' shapes are theirs, and commands run what is legal."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from helix.command.cli import command
from helix.command.compose import prepare, typed
from helix.config import environment
from helix.config.check import check
from helix.config.memory import estimate, stored_parameters
from helix.config.methods import from_name, to_name
from helix.config.schema import (
    ConfigError,
    InferConfig,
    ModelConfig,
    ParallelConfig,
    expert_parallel,
    to_grid,
    to_shape,
)

CONF = Path(__file__).resolve().parents[1] / "conf"
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # no handler outlives the test


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture
def settings() -> Iterator[Callable[..., InferConfig]]:
    prepare()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: typed(compose("infer", list(overrides)), CONF)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A large machine with an account, so that only the configs themselves can be refused."""
    for variable in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setattr(environment, "free_memory_bytes", lambda: 10**15)
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield tmp_path
    # Hydra's --info writes to the standard output of its moment, which later tests no longer have.
    root.handlers, root.level = handlers, level


def sized(parallel: str) -> list[str]:
    """The free grid needs its two sizes."""
    return [f"parallel={parallel}", *(["parallel.m=2", "parallel.n=8"] if parallel == "helix" else [])]


def modelled(name: str, folder: Path) -> list[str]:
    """A pretrained model needs a prompt, and a folder unless it is a package's."""
    if name not in ("pretrained", "smollm2"):
        return [f"model={name}"]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 99}
    sizes |= {"vocab_size": 100, "max_position_embeddings": 128}
    own = folder / "pretrained"
    own.mkdir(exist_ok=True)
    (own / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    (own / "model.safetensors").touch()
    (own / "tokenizer.model").touch()
    return [f"model={name}", "prompt=Hello", *([f"model.path={own}"] if name == "pretrained" else [])]


@pytest.mark.parametrize("group", ["model", "workload", "hardware", "logger"])
def test_every_option_composes(group: str, settings: Callable[..., InferConfig], machine: Path) -> None:
    for option in options(group):
        one = settings(*(modelled(option, machine) if group == "model" else [f"{group}={option}"]))
        assert type(one) is InferConfig
        assert group == "logger" or getattr(one, group).name == option
        check(one)


def test_a_pretrained_model_has_its_folders_sizes(settings: Callable[..., InferConfig], machine: Path) -> None:
    one = settings(*modelled("pretrained", machine))
    model = one.model
    assert (model.layers, model.width, model.heads, model.kv_heads, model.head_dim) == (2, 64, 16, 16, 4)
    assert (model.mlp_hidden, model.vocab, model.context, model.experts) == (99, 100, 128, 0)
    assert one.workload.name == "generation"
    smollm2 = settings("model=smollm2", "prompt=Hello")
    assert to_name(smollm2.parallel) == "helix_4x3"
    assert to_name(settings("model=smollm2", "parallel=helix_1x3").parallel) == "helix_1x3"


def test_every_method_runs_every_model_and_workload(settings: Callable[..., InferConfig], machine: Path) -> None:
    """Groups do not overlap, so that options composed one by one may be put together."""
    pretrained = {"pretrained", "smollm2"}
    models = [settings(f"model={name}").model for name in options("model") if name not in pretrained]
    workloads = [settings(f"workload={name}").workload for name in options("workload")]
    for parallel in options("parallel"):
        # For three KV heads, or 1,024 ranks, which these models and machines have not; auto is not yet a method.
        if parallel in ("helix_4x3", "helix_1x3", "helix_2x3", "helix_64x16", "auto"):
            continue
        one = settings(*sized(parallel))
        assert to_name(one.parallel) == ("helix_2x8" if parallel == "helix" else parallel)
        for model, workload in itertools.product(models, workloads):
            check(replace(one, model=model, workload=workload))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_and_can_run_here(
    experiment: str, settings: Callable[..., InferConfig], machine: Path
) -> None:
    one = settings(f"experiment={experiment}")
    check(one)
    assert one.baseline or one.prompt
    assert one != settings()


@pytest.mark.parametrize(("experiment", "paper"), [(name, name) for name in options("model") if "paper" in name])
def test_the_papers_settings_are_divided_by_one_factor(
    experiment: str, paper: str, settings: Callable[..., InferConfig]
) -> None:
    """Widths, batch and length by 16; heads, layers and experts stay."""
    workload = "paper_1024" if "4l" in paper else "paper"
    small, whole = settings(f"experiment={experiment}"), settings(f"model={paper}", f"workload={workload}")
    for name in ("width", "head_dim", "mlp_hidden"):
        assert getattr(small.model, name) * 16 == getattr(whole.model, name)
    for name in ("layers", "heads", "kv_heads", "experts", "top_k"):
        assert getattr(small.model, name) == getattr(whole.model, name)
    assert small.workload.batch_size * 16 == whole.workload.batch_size
    assert small.workload.seq_len * 16 == whole.workload.seq_len


@pytest.mark.parametrize(
    "name",
    ["single", "dp16", "tp16", "tp16_sp", "tp8_pp2", "tp8_sp_pp2", "tp4_dp4", "tp2_pp2_dp4", "cp16", "ulysses16",
     "autotp16", "hf_tp16", "helix_2x8", "helix_2x8_rows", "helix_12x1_perslice"],
)  # fmt: skip
def test_a_methods_name_says_its_layout(name: str) -> None:
    assert to_name(from_name(name)) == name


@pytest.mark.parametrize("name", ["helix", "helix_4", "tp", "tp0", "pp2", "dp16_pp2", "helix_2x8_auto", "TP16", ""])
def test_what_is_no_methods_name(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no method"):
        from_name(name)


def test_the_default_is_the_sentence_of_use(settings: Callable[..., InferConfig]) -> None:
    assert settings() == settings("parallel=helix_4x4", "model=moe", "hardware=auto", "workload=small", "logger=wandb")
    assert settings().parallel.ranks == 16
    assert settings().logger.mode == "offline"


@pytest.mark.parametrize(
    ("model", "billions"),
    # By hand, from the papers' text: layers x (4 E^2 for attention + 2 E F for each MLP), the rest below 1 %.
    [
        ("paper_dense_16l", 16 * (4 * 4096**2 + 2 * 4096 * 16384) / 1e9),
        ("paper_dense_4l", 4 * (4 * 8192**2 + 2 * 8192 * 32768) / 1e9),
        ("paper_dense_2l", 2 * (4 * 4096**2 + 2 * 4096 * 16384) / 1e9),
        ("paper_moe_4l", 4 * (4 * 8192**2 + 8 * 2 * 8192 * 32768) / 1e9),
    ],
)
def test_the_papers_models_have_their_size(model: str, billions: float, settings: Callable[..., InferConfig]) -> None:
    shape = to_shape(settings(f"model={model}").model)
    assert shape.parameters() / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.attention_width == shape.width
    assert model != "paper_dense_16l" or round(shape.parameters() / 1e9, 1) == 3.2


def test_experts_are_stored_once_for_each_replica_of_them(settings: Callable[..., InferConfig]) -> None:
    one = settings()
    shape = to_shape(one.model)
    experts = 4 * 8 * 2 * 512 * 1024
    assert expert_parallel(one.model, one.parallel) == 8
    # 16 ranks hold 8 experts twice.
    assert stored_parameters(one.model, one.parallel) == shape.parameters() + experts
    twice = settings("parallel.data=2")
    assert stored_parameters(twice.model, twice.parallel) == 2 * (shape.parameters() + experts)


def test_the_estimate_counts_what_this_host_holds(settings: Callable[..., InferConfig]) -> None:
    one = settings("model=dense", "precision=bf16-true")
    parameters = to_shape(one.model).parameters()
    assert estimate(one, 16).weights == 2 * parameters
    assert estimate(one, 8).weights == parameters
    assert estimate(one, 16).reference > 4 * parameters
    score = settings("model=dense", "precision=bf16-true", "parallel.schedule=score", "workload.seq_len=4096")
    rows = settings("model=dense", "precision=bf16-true", "parallel.schedule=rows", "workload.seq_len=4096")
    # [B, H/n, T, S] in fp32 on each of 16 ranks.
    assert estimate(score, 16).activations - estimate(rows, 16).activations == 3 * 16 * 16 * 4 * 4096**2 * 4


def test_the_estimate_counts_every_method(settings: Callable[..., InferConfig]) -> None:
    """A replica on each of 16 ranks, and the copies that tensor parallelism cuts up, beside the main method's."""
    alone, beside = settings("model=dense"), settings("model=dense", "baseline=[dp16,tp8_pp2,single]")
    parameters = to_shape(alone.model).parameters()
    more = estimate(beside, 16).weights - estimate(alone, 16).weights
    assert more == 4 * parameters * (16 + 1 + 1 + 16)
    assert stored_parameters(settings().model, from_name("dp16")) < 16 * to_shape(settings().model).parameters() / 2


def test_shape_and_grid_follow_the_schema() -> None:
    model = ModelConfig(name="x", layers=1, width=12, heads=6, head_dim=4, mlp_hidden=8, kv_heads=3, qk_norm=True)
    shape = to_shape(model)
    assert (shape.kv_heads, shape.head_dim, shape.qk_norm, shape.causal) == (3, 4, True, True)
    assert to_shape(ModelConfig(name="x", layers=1, width=12, heads=6, head_dim=4, mlp_hidden=8)).kv_heads == 6
    assert to_grid(ParallelConfig(m=4, n=2)).name == to_name(ParallelConfig(m=4, n=2)) == "helix_4x2"
    assert to_name(ParallelConfig(method="single", m=1, n=1)) == "single"


def test_every_hardware_figure_has_a_source() -> None:
    for path in (CONF / "hardware").glob("*.yaml"):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(": ")
            # A measured curve's points have the source that is beside its name.
            if not key.startswith(("#", " ")) and value[:1].isdigit():
                assert "#" in value, f"{path.name}: {key}"


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, bool]]:
    """The command of a task that only notes what it was called with, and whether its folder was there."""
    calls: list[tuple[str, Path, bool]] = []

    @command("infer", conf=CONF)
    def main(one: InferConfig, run_dir: Path) -> None:
        calls.append((to_name(one.parallel), run_dir, run_dir.is_dir()))

    monkeypatch.setattr(sys, "argv", ["infer.py", *arguments, *QUIET])
    main()
    return calls


def test_a_run_has_a_folder_of_its_method(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path.cwd()
    [(name, run_dir, made)] = run(["parallel=helix", "parallel.m=2", "parallel.n=8"], monkeypatch)
    assert (name, made) == ("helix_2x8", True)
    assert run_dir.parent == machine / "outputs" / "helix_2x8"
    assert Path.cwd() == before
    assert OmegaConf.load(run_dir / ".hydra" / "config.yaml").parallel.m == 2


@pytest.mark.parametrize("flag", [["-m"], ["hydra.mode=MULTIRUN"]])
def test_a_sweep_runs_every_job(flag: list[str], machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = run([*flag, "parallel=helix_4x4,single", "seed=0,1"], monkeypatch)
    assert [name for name, _, _ in calls] == ["helix_4x4", "helix_4x4", "single", "single"]
    assert [run_dir.name for _, run_dir, _ in calls] == ["0_helix_4x4", "1_helix_4x4", "2_single", "3_single"]
    assert all(made and run_dir.is_relative_to(machine / "multirun") for _, run_dir, made in calls)


def test_only_rank_0_of_a_launcher_has_a_folder(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", "3")
    [(name, _, made)] = run(["parallel=helix_4x4"], monkeypatch)
    assert (name, made) == ("helix_4x4", False)
    assert list(machine.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "infer.py: error: interrupted\n"),
        (RuntimeError("a fault of ours"), 1, "Traceback"),  # which the user should send us whole
    ],
)
def test_ways_to_end(
    error: BaseException,
    code: int,
    said: str,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @command("infer", conf=CONF)
    def main(one: InferConfig, run_dir: Path) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["infer.py", *QUIET])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (
            ["--help"],
            ["parallel: auto, dp16, helix, helix_16x1", "model: dense, moe, paper_dense_16l", "logger: none, wandb"],
        ),
        (["--cfg", "job", "parallel=helix_2x8"], ["schedule: auto", "experts: 8"]),
        (["--info", "defaults", "model=dense"], ["model/dense"]),
        (["--hydra-help"], ["Hydra"]),
    ],
)
def test_asking_runs_nothing(
    arguments: list[str],
    shown: list[str],
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @command("infer", conf=CONF)
    def main(one: InferConfig, run_dir: Path) -> None:
        raise AssertionError

    monkeypatch.setattr(sys, "argv", ["infer.py", *arguments])
    with contextlib.suppress(SystemExit):  # of code 0 or none, as what is shown below shows
        main()
    said = capsys.readouterr().out
    assert all(fragment in said for fragment in shown)
    assert list(machine.iterdir()) == []
