"""A dry run of pretrained models: from a config.json alone, the bytes, cache and weights that `helixify` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pretrained
import pytest

from helix.config.generation import check_dry_answer, check_generation
from helix.config.hardware import HardwareConfig
from helix.config.methods import from_name
from helix.config.schema import ConfigError, InferConfig, LoggerConfig, ModelConfig, WorkloadConfig
from helix.dryrun.run import run
from helix.generation.asked import check
from helix.planner.catalogue import hardware

FAMILIES = ("llama", "gpt2", "mixtral")  # of which the closed form of the weights, or of the positions, is exact


def settings(folder: Path, name: str, length: int = 20) -> InferConfig:
    model = ModelConfig(name="model", kind="pretrained", path=str(folder))
    stated = json.loads((folder / "config.json").read_text())
    sizes = {"layers": 2, "width": stated.get("hidden_size", 32), "heads": 4, "head_dim": 8, "context": 128}
    sizes |= {"mlp_hidden": 44, "vocab": pretrained.VOCAB, "kv_heads": stated.get("num_key_value_heads", 4)}
    sizes["experts"] = stated.get("num_local_experts", 0)
    for key, value in sizes.items():
        setattr(model, key, value)
    return InferConfig(
        parallel=from_name(name),
        model=model,
        hardware=HardwareConfig(name="auto", source="this machine"),
        workload=WorkloadConfig("generation", batch_size=4, seq_len=length, warmup=1, iterations=1, runs=2),
        logger=LoggerConfig(kind="none"),
        dry_run=True,
    )


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """With a configuration and nothing else."""
    pretrained.config(getattr(request, "param", "llama")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def report_of(one: InferConfig, run_dir: Path) -> dict[str, Any]:
    check(one)
    run(one, run_dir)
    found: dict[str, Any] = json.loads((run_dir / "dry_run.json").read_text())
    return found


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
@pytest.mark.parametrize("name", ["helix_2x2", "helix_4x1_rows_decode_kvseq"])
def test_a_prompt_and_a_token_move_what_the_closed_forms_say(folder: Path, name: str, tmp_path: Path) -> None:
    one = settings(folder, name)
    one.hardware = hardware("dgx_h100")
    main = report_of(one, tmp_path)["main"]
    assert [each["name"] for each in main["passes"]] == ["prompt", "token"]
    for each in main["passes"]:
        assert each["collectives"]
        for key, found in each["collectives"].items():
            assert found["bytes"]["traced"] == found["bytes"]["predicted"] > 0, key
            assert found["calls"] == (
                1 if key.split("/")[1].split(".")[0] in ("embedding", "positions", "head") else 2
            )
        assert sum(each["seconds"]["mlp"].values()) > 0
        assert each["predicted_seconds"]["exchange"] > 0
    assert main["cache"]["traced"] == main["cache"]["predicted"]
    if "gpt2" not in (folder / "config.json").read_text():  # which has biases, that the form leaves out
        assert main["weights"]["traced"] == main["weights"]["predicted"]
    assert (tmp_path / "traces" / name / "predicted.json.gz").exists()


def test_one_process_has_all_of_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = settings(folder, "helix_2x2")
    one.baseline = ["single"]
    found = report_of(one, tmp_path)
    single = found["baselines"][0]
    prompt, token = single["passes"]
    assert single["idle_ranks"] == 3
    assert prompt["collectives"] == token["collectives"] == {}
    assert (
        prompt["flops"]["traced"] == prompt["flops"]["predicted"] > 3 * found["main"]["passes"][0]["flops"]["traced"]
    )
    assert single["cache"]["traced"] == 4 * found["main"]["cache"]["traced"]
    assert "nothing computed" in capsys.readouterr().out


def test_what_is_missing_is_asked_for(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a prompt's length: give workload.seq_len=1024, or prompt="):
        check_dry_answer(settings(folder, "helix_2x2", length=1))
    one = settings(folder, "helix_2x2", length=1000)
    with pytest.raises(ConfigError, match="context of 128"):
        check_generation(one)
    one = settings(folder, "helix_2x2")
    one.baseline = ["hf_tp4"]
    with pytest.raises(ConfigError, match="baseline=hf_tp4 is another project's code"):
        check_generation(one)
