"""`python -m helix plan`: what it prints and writes, what it refuses, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import helix
from helix.__main__ import main
from helix.command.plan import settings as plan_settings
from helix.config.check import check_model
from helix.config.methods import from_name
from helix.config.schema import ConfigError
from helix.figures.pareto import pareto
from helix.partition.grid import PartitionError
from helix.partition.shape import TransformerShape
from helix.planner import catalogue
from helix.planner.candidates import Asked
from helix.study import plan_table


def test_a_plan_is_json_a_table_and_a_picture() -> None:
    plan = helix.plan("qwen3_235b_a22b", "dgx_h100", 64, mode="generate", batch=64, length=4096, new_tokens=256)
    content = json.loads(json.dumps(plan.as_dict()))
    assert content["best"]["name"] == plan.best.layout.name
    assert content["best"]["memory_bytes"]["total"] == plan.best.memory.total
    assert len(content["pareto"]) == len(plan.pareto)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(plan_table.render(plan))
    text = console.export_text()
    assert plan.best.layout.name in text.splitlines()[0]
    assert "error is unknown" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    axes = pareto(content).axes[0]
    assert len(axes.collections) == 1 + len(plan.rivals)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "model=smollm2", "hardware=h200", "workload.batch_size=8", "workload.seq_len=128"]
    main([*words, "--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png")])
    assert "dp8" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["best"]["name"] == "dp8"
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    main(["plan", "--published"])
    main(["plan", "--papers", "--json", str(tmp_path / "papers.json")])
    assert "median error 11.9%" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tmp_path / "papers.json").read_text())
    assert next(one["model"] for one in content["settings"]) == "paper_dense_16l"
    assert {"command", "git_commit", "made_at", "versions"} <= set(content)
    words = ["plan", "--known", "hardware=dgx_h100", "mode=generate", "workload.batch_size=8", "new_tokens=8"]
    main([*words, "--json", str(tmp_path / "known.json")])
    assert "deepseek_v3: model=deepseek_v3 has multi-head latent attention" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "known.json").read_text())["rows"]) == 1 + 4 * 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=llama"], "there is no model=llama"),
        (["model=pretrained"], "there is no model=pretrained"),
        (["hardware=auto"], "hardware=auto does not say hardware.matmul_bf16_TFLOP_per_s"),
        (["hardware.matmul_share=2"], "hardware.matmul_share must be at most 1, not 2"),
        (["goal=speed"], "goal cannot be 'speed'"),
        (["devices=many"], "devices takes a whole number or null, not many"),
        (["parallel.k=1"], "there is no key parallel.k"),
        (["model=deepseek_v3"], "model=deepseek_v3 has multi-head latent attention"),
        (["model=llama3_70b", "devices=1"], "memory binds: llama3_70b needs at least"),
        (["--json", "/nowhere/plan.json"], "--json /nowhere/plan.json: there is no folder"),
        (["--published", "devices=2"], "--published takes no settings, such as devices=2"),
        (["--papers", "--plot", "plan.png"], "--plot is of one plan, and not of --papers"),
        (["--known", "model=smollm2"], "--known has models and numbers of devices of its own, instead of model="),
        (["--known", "goal=tpot"], "goal=tpot is none of mode=forward"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m helix: error: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["llama3_70b", "qwen3_235b_a22b", "smollm2", "gemma4_global"])
def test_known_models_can_be_planned_and_not_run(name: str) -> None:
    one = plan_settings([f"model={name}", "hardware=dgx_h100"])
    assert one.model.name == name
    with pytest.raises(ConfigError, match=rf"model={name} has gated MLPs, which Helix's own transformer lacks"):
        check_model(one.model, from_name("helix_1x1"))


def test_planning_needs_no_torch() -> None:
    code = "import helix, sys; helix.plan('smollm2', 'h200'); print(*{'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_hugging_face_folder_is_planned_by_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    given: dict[str, Any] = {"mode": "generate", "batch": 1, "length": 64, "new_tokens": 8}
    plan = helix.plan(str(folder), "h200", 4, asked=Asked(stage=1), goal="tpot", **given)
    shape = catalogue.shape(catalogue.model(str(folder)), "generate")
    assert shape == TransformerShape(4, 256, 8, 2, 32, 512, 1000, rope=False, gated=True, tied=True)
    assert (plan.model, plan.best.layout.ranks) == ("llama", 4)
    main(["plan", f"model={folder}", "hardware=h200", "devices=4", "mode=generate", "workload.seq_len=64"])
    assert "model llama on 4 devices of h200" in capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_type": "deepseek_v3"}))
    with pytest.raises(PartitionError, match="Helix does not partition deepseek_v3 models"):
        helix.plan(str(folder), "h200")
