"""`parallel=auto`: that what the planner chooses is what runs, is named, told and reported; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from hydra import compose, initialize_config_dir
from sweeps import TINY

from helix.command import plan as plan_command
from helix.command.choose import choose, concrete, devices_of
from helix.command.cli import _arguments
from helix.command.compose import compose_jobs, found_jobs, job_folder, prepare, typed
from helix.command.job import Command as TheCommand
from helix.command.job import Stop, check_agreed, settle
from helix.command.sweep import outcome
from helix.config import environment
from helix.config.check import check
from helix.config.methods import from_name, to_name
from helix.config.parallel import GOALS
from helix.config.schema import PRETRAINED, ConfigError, InferConfig, Misfit, digest
from helix.config.train_schema import TrainConfig, check_training
from helix.planner import catalogue
from helix.planner.candidates import Asked, candidates
from helix.planner.chosen import compared, told
from helix.planner.work import Work
from helix.study.table import chosen_line

CONF = Path(__file__).resolve().parents[1] / "conf"
SMALL = ["model.layers=2", "model.width=64", "model.mlp_hidden=64", "logger=none", "device=cpu"]
PROMPT = ["model=smollm2", "prompt=The capital of France is", "logger=none", "device=cpu"]
# A node whose file says everything that a plan asks for.
NODE = ["hardware=dgx_h100", "precision=bf16-true"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores of a machine with enough memory, nothing started, no GPU."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    monkeypatch.setattr(environment, "cores", lambda: 2)
    monkeypatch.setattr(environment, "memory_bytes", lambda: 16 * 10**9)
    monkeypatch.setattr(environment, "free_memory_bytes", lambda: 10**15)


def infer(*words: str, name: str = "infer", schema: type = InferConfig) -> Any:
    prepare((), name, schema)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose(name, list(words)), CONF)


def train(*words: str) -> Any:
    return infer(*words, name="train", schema=TrainConfig)


def _every_layout(one: Any, work: Work, ranks: int, check_all: Callable[[Any], None]) -> set[str]:
    """Hold every layout that the planner calls runnable against the command's own names and checks."""
    model = "smollm2" if one.model.kind == PRETRAINED else one.model
    shape = catalogue.shape(catalogue.model(model) if isinstance(model, str) else model, work.mode)
    methods = set()
    for alike in candidates(shape, work, ranks, Asked(runnable=True)):
        for layout in alike:
            parallel = concrete(layout, work.mode, one.parallel)
            named = from_name(to_name(parallel))
            sizes = ("method", "m", "n", "data", "stage", "schedule", "decode")
            assert all(getattr(named, key) == getattr(parallel, key) for key in sizes), (layout, parallel)
            assert to_name(parallel).startswith(layout.name)
            assert parallel.ranks == layout.ranks == ranks
            if layout.m > 1:
                assert parallel.schedule == layout.prefill
                assert work.mode != "generate" or parallel.decode == layout.decode
            assert (parallel.residual == "sharded") == (layout.options.residual == "sharded")
            assert layout.stage == 1 or parallel.microbatches == layout.microbatches
            check_all(replace(one, parallel=parallel))
            methods.add(parallel.method)
    return methods


def test_every_layout_for_a_forward_pass_is_one_that_infer_takes() -> None:
    for model in ("tiny", "tiny_moe"):
        one = infer(f"model={model}", "parallel=auto", "workload.batch_size=12", *SMALL)
        for ranks in (1, 4, 6, 12):
            found = _every_layout(one, Work("forward", 12, 64, precision="32-true"), ranks, check)
            assert found == ({"single"} if ranks == 1 else {"helix", "tensor", "data"})


def test_every_layout_for_training_is_one_that_train_takes() -> None:
    for model in ("tiny", "tiny_moe"):
        one = train(f"model={model}", "parallel=auto", "data.batch_size=12", *SMALL)
        for ranks in (1, 4, 12):
            found = _every_layout(one, Work("train", 12, 64, precision="32-true"), ranks, check_training)
            replicas = set() if model == "tiny_moe" else {"data"}
            assert found == ({"single"} if ranks == 1 else {"helix", "tensor"} | replicas)


def test_every_layout_for_a_prompt_is_one_that_infer_takes() -> None:
    one = infer("parallel=auto", *PROMPT)
    for ranks in (1, 4, 6, 12):
        found = _every_layout(one, Work("generate", 1, 8, 32, "32-true"), ranks, check)
        assert found == {"single" if ranks == 1 else "helix"}


@pytest.mark.parametrize("goal", GOALS)
def test_auto_and_the_command_plan_agree(goal: str) -> None:
    cases: list[tuple[Any, list[str]]] = []
    asked = ["parallel=auto", "parallel.devices=8", f"parallel.goal={goal}", *NODE]
    if goal not in ("ttft", "tpot"):
        cases.append((infer(*asked, "model=dense"), ["model=dense", "workload=small"]))
        words = ["mode=train", "model=tiny", "workload.batch_size=16", "workload.seq_len=128"]
        cases.append((train(*asked, "parallel.m=2"), [*words, "parallel.m=2"]))
    prompt = [*asked, *PROMPT, "generate.max_new_tokens=16", f"prompt={'a' * 320}"]
    words = ["mode=generate", "model=smollm2", "workload.batch_size=1", "workload.seq_len=80", "new_tokens=16"]
    cases.append((infer(*prompt), words))
    for one, words in cases:
        options = [*words, *NODE, f"goal={goal}", "devices=8", "parallel.runnable=true"]
        plan = plan_command.plan_of(plan_command.settings(options))
        found = choose(one)
        assert concrete(plan.best.layout, plan.work.mode, one.parallel) == found.parallel
        assert found.chosen.reasons == plan.reasons
        assert found.chosen.predicted.tokens_per_s == plan.best.tokens_per_s
        assert found.chosen.predicted.memory_bytes_per_rank["total"] == plan.best.memory.total


def test_a_choice_is_the_layout_as_if_it_had_been_named() -> None:
    one = choose(infer("parallel=auto", "parallel.m=2", "parallel.devices=4", "model=tiny", "baseline=[single,tp4]"))
    assert one.parallel.m == 2
    assert one.parallel.ranks == 4
    named = one.parallel
    words = [f"parallel.{key}={getattr(named, key)}" for key in ("m", "n", "data", "schedule")]
    assert named.method == "helix"
    assert digest(one) == digest(infer("parallel=helix", *words, "model=tiny", "baseline=[single,tp4]"))
    assert digest(one) == digest(replace(one, chosen=None))
    assert one.chosen.goal == "throughput"
    assert one.chosen.devices == 4
    itself = choose(infer("parallel=auto", "parallel.devices=2", "model=tiny", "baseline=[dp2,single,helix_1x2]"))
    assert to_name(itself.parallel) not in itself.baseline
    assert len(itself.baseline) >= 2


def test_uneven_batches_of_prompts_have_each_their_own_schedules() -> None:
    prompts = "prompt=[one,two,three,four,five]"
    one = choose(infer("parallel=auto", "parallel.devices=4", *PROMPT, prompts, "workload.batch_size=4"))
    assert (one.parallel.m, one.parallel.schedule, one.parallel.decode) == (4, "auto", "auto")
    even = choose(infer("parallel=auto", "parallel.devices=4", *PROMPT, prompts, "workload.batch_size=5"))
    assert even.parallel.schedule != "auto"
    assert even.chosen.goal == "tpot"
    check(one)
    check(even)


def test_as_many_devices_as_were_asked_for_were_started_or_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = infer("parallel=auto").parallel
    assert devices_of(parallel, "auto") == 2
    monkeypatch.setattr(environment, "gpus", lambda: 8)
    assert devices_of(parallel, "auto") == 8
    assert devices_of(parallel, "cpu") == 2
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert devices_of(parallel, "auto") == 6
    assert devices_of(replace(parallel, devices=12), "auto") == 12
    assert infer("parallel=auto", "experiment=weak_scaling").workload.batch_size == 6


def test_gpus_need_the_name_of_their_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: 4)
    with pytest.raises(ConfigError, match=r"needs hardware= on GPUs.*hardware=h200.*python -m helix calibrate"):
        choose(infer("parallel=auto"))
    assert choose(infer("parallel=auto", "hardware=h200")).chosen.hardware == "h200"
    assert choose(infer("parallel=auto", "device=cpu")).chosen.hardware == "cpu"


def test_figures_of_ones_own_go_before_the_catalogues() -> None:
    words = ["parallel=auto", "parallel.devices=2", "parallel.goal=memory", "model=tiny"]
    slow = choose(infer(*words, "hardware.matmul_fp32_TFLOP_per_s=0.001"))
    assert slow.chosen.predicted.step_ms > 5 * choose(infer(*words)).chosen.predicted.step_ms


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["parallel.goal=troughput"], r"parallel.goal cannot be 'troughput' \(did you mean throughput\?\)"),
        (["parallel.goal=tpot"], "parallel.goal=tpot is of generated text .* throughput, latency, memory"),
        (["parallel.devices=0"], "parallel.devices must be at least 1, not 0"),
        (["parallel.m=-1"], "parallel.m must be at least 1, not -1"),
        (["parallel.m=2", "parallel.n=2", "parallel.devices=6"], "are 4 ranks, which do not divide 6 devices"),
        (["parallel.devices=13", "workload.batch_size=1"], "13 devices .a prime number."),
        (["parallel.schedule=rows"], "parallel.schedule=rows cannot be given with parallel=auto"),
        (["model=moe", "model.ep_size=2"], "model.ep_size=2 cannot be given with parallel=auto"),
        (["parallel=helix_4x4", "parallel.devices=16"], "parallel.devices=16 is of parallel=auto"),
        (["parallel=helix_4x4", "parallel.goal=memory"], "parallel.goal=memory is of parallel=auto"),
        (["chosen=dp2"], "chosen= is what parallel=auto comes to"),
        (["hardware.memory_GB_per_device=0.01", "model=dense"], "memory binds: dense needs at least"),
        (["workload.batch_size=0"], "workload.batch_size must be at least 1, not 0"),
        (["model=smollm2"], "give prompt="),
        (["model=known/deepseek_v3"], "multi-head latent attention"),
    ],
)
def test_wrong_input_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises((ConfigError, Misfit, ValueError), match=sentence) as refused:
        choose(infer("parallel=auto", *words))
    assert "\n" not in str(refused.value)


def test_a_refusal_launches_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    words = ["parallel=auto", "parallel.devices=6", "parallel.m=4", "device=cpu"]
    process = Command("infer.py", f"hydra.run.dir={tmp_path}/here", *words)
    out, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("infer.py: error: ")
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_jobs_of_a_sweep_choose_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", "parallel=auto", "parallel.devices=1,2,13", "model=tiny", "workload.batch_size=2", *SMALL[-2:]]
    monkeypatch.setattr("sys.argv", ["infer.py", *words])
    prepare(words[1:])
    composed = compose_jobs("infer", CONF, _arguments())
    assert composed.jobs is not None
    this = TheCommand("infer", CONF, lambda one, folder: None)
    jobs = [(job_folder(cfg).name, *settle(this, cfg)) for cfg in composed.jobs]
    assert [name for name, _, _ in jobs] == ["0_single", "1_dp2", "2_auto"]
    assert [one.parallel.ranks for _, one, _ in jobs[:2]] == [1, 2]
    assert [misfit is None for _, _, misfit in jobs] == [True, True, False]
    assert len({digest(one) for _, one, _ in jobs}) == 3


def test_ranks_of_hosts_that_differ_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = choose(infer("parallel=auto", "parallel.devices=2", "model=tiny", *SMALL))
    this = TheCommand("infer", CONF, lambda one, folder: None, agree=lambda own: ["helix_2x1"] * len(own))
    check_agreed(this, [one])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_agreed(this, [replace(one, chosen=None)])
    check_agreed(replace(this, agree=lambda own: own), [one])
    with pytest.raises(Stop) as stopped:
        check_agreed(this, [one])
    assert stopped.value.code == 2
    assert f"comes to helix_2x1 on rank 0's host and to {to_name(one.parallel)} on" in capsys.readouterr().err


def test_a_training_is_chosen_for_and_named_after_it() -> None:
    words = ["parallel=auto", "parallel.devices=4", "model=tiny_moe", "logger=none"]
    one: TrainConfig = choose(train(*words))
    check_training(one)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        folder = compose("train", words, return_hydra_config=True).hydra.run.dir
    assert folder.startswith(f"outputs/train_{to_name(one.parallel)}/")
    assert one.chosen.work["mode"] == "train"
    shared = choose(train("parallel=auto", "parallel.data=2", "parallel.devices=2", "parallel.shard_data=true"))
    whole = choose(train("parallel=auto", "parallel.data=2", "parallel.devices=2"))
    held = [each.chosen.predicted.memory_bytes_per_rank["state"] for each in (shared, whole)]
    assert held[0] < held[1]
    assert shared.parallel.shard_data


def test_what_is_said_fits_a_terminal_and_holds_the_figures() -> None:
    one = choose(infer("parallel=auto", "parallel.devices=4", "model=tiny", *SMALL)).chosen
    first, second = told(one).splitlines()
    assert one.predicted.name in first
    assert one.runner_up.name in first
    assert "ms a step" in first
    assert second.startswith(one.reasons[0])
    assert compared(replace(one, predicted=replace(one.predicted, step_ms=9.0)), 10.0).endswith(
        "a step predicted 9 ms, measured 10 ms (-10%)."
    )
    assert chosen_line(None, 1.0) == []
    assert str(chosen_line(one, 1.0)[-1]) == compared(one, 1.0)


def test_a_sweep_runs_what_was_chosen_and_reports_both_figures(tmp_path: Path) -> None:
    words = ["-m", f"hydra.sweep.dir={tmp_path}", "parallel=auto", "parallel.n=1,2", "parallel.devices=2", *TINY]
    process = Command("infer.py", *words, "baseline=[single]", "device=cpu")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    jobs = found_jobs(tmp_path, InferConfig)
    assert [outcome(job).status for job in jobs] == ["done", "done"]
    for job in jobs:
        report = json.loads((job.folder / "report.json").read_text())
        assert report["method"]["name"] == report["chosen"]["predicted"]["name"] == to_name(job.settings.parallel)
        assert job.folder.name.endswith(report["method"]["name"])
        assert report["world_size"] == report["chosen"]["devices"] == 2
        assert report["step_ms"]["mean"] > 0
        assert report["chosen"]["predicted"]["step_ms"] > 0
        assert f"parallel=auto: {report['method']['name']} for throughput on 2 devices" in err
        held = report["chosen"]["predicted"]["memory_bytes_per_rank"]
        assert report["memory_bytes_per_rank"]["weights"] == held["weights"]
    assert out.count("parallel=auto chose") == 2
