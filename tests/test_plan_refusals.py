"""What `python -m helix` refuses in one sentence before it works, and what it takes by a path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from matplotlib.backend_bases import FigureCanvasBase

import helix
from helix.__main__ import main
from helix.command.choose import choose
from helix.command.compose import prepare, typed
from helix.command.job import check_chosen
from helix.command.plan import settings
from helix.config.dry_run import check_dry_run
from helix.config.schema import ConfigError, InferConfig
from helix.config.train_schema import TrainConfig
from helix.dryrun.run import run
from helix.planner.catalogue import CONF, check_named, read
from helix.study.plan_command import PICTURES, check_file


def composed(words: list[str], name: str = "infer", schema: type = InferConfig) -> Any:
    prepare((), name, schema)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose(name, words), CONF)


@pytest.mark.parametrize("words", [["plan", "--map"], ["plan", "--plot"], ["validate", "cpu", "--plot"]])
def test_a_picture_that_cannot_be_written_is_refused_first(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path, said in (("/proc/x.png", "cannot be written"), ("/tmp/p.xyz", "end it with one of: .png, .pdf")):
        with pytest.raises(SystemExit) as stopped:
            main([*words, path])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"{words[-1]} {path}" in error
        assert said in error
        assert len(error.splitlines()) == 1


def test_a_file_is_checked_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    check_file("--json", tmp_path / "old.json")
    check_file("--plot", tmp_path / "new.PNG", picture=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "{}"
    with pytest.raises(ConfigError, match="cannot be written"):
        check_file("--json", Path("/proc/x.json"))
    assert {suffix[1:] for suffix in PICTURES} <= set(FigureCanvasBase.get_supported_filetypes())


def test_a_choice_for_gpus_is_traced_and_not_run_on_cores() -> None:
    words = ["model=tiny", "logger=none", "parallel=auto", "parallel.devices=4", "hardware=h200", "device=cpu"]
    words.append("precision=bf16-true")
    kinds: list[tuple[str, type, str]] = [
        ("infer", InferConfig, "dry_run=true"),
        ("train", TrainConfig, "python -m helix plan mode=train"),
    ]
    for name, schema, instead in kinds:
        one = choose(composed(words, name, schema))
        with pytest.raises(ConfigError, match=f"device=cpu computes 4 ranks .* take {instead} for a prediction"):
            check_chosen(one)
    for more in ("dry_run=true", "hardware=cpu", "hardware=auto"):
        check_chosen(choose(composed([*words, "precision=32-true", more])))


def test_a_dry_run_chooses_what_it_can_trace() -> None:
    words = ["parallel=auto", "parallel.devices=16", "hardware=dgx_h100_x2", "precision=bf16-true", "logger=none"]
    run, traced = (choose(composed([*words, *more])) for more in ([], ["dry_run=true"]))
    assert run.parallel.stage > 1
    assert traced.parallel.stage == 1
    check_dry_run(traced)


def test_a_dry_run_has_the_times_of_the_machine_that_decided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["parallel=auto", "parallel.devices=4", "dry_run=true", "device=cpu", "model=tiny", "logger=none"]
    one = choose(composed(words))
    run(one, tmp_path)
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert found["hardware"]["name"] == one.chosen.hardware == "cpu"
    assert found["main"]["passes"][0]["seconds"]
    told = " ".join(capsys.readouterr().out.split())
    assert "No times" not in told
    assert "eager PyTorch runs many more" in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hosts: banana", "hosts takes a whole number or null, not banana"),
        ("hosst: 1", "key hosst (did you mean hosts?)"),
        ("exchanges: [{kind: all_gather, ranks: x}]", "exchanges is not as python -m helix calibrate writes it"),
        ("turns: 4", "turns is not as"),
        ("name: x", "source is not given"),
        ("- 3", "it has no keys"),
        ("name: x\nhosts: [1", "x.yaml is no legal YAML at line 2"),
        ("name: ${x}\nsource: y", "leads nowhere"),
    ],
)
def test_a_wrong_hardware_file_is_told_by_its_key(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read(tmp_path / "x.yaml")
    assert str(refused.value).startswith(str(tmp_path))
    assert said in str(refused.value)
    assert len(str(refused.value)) < 200 + len(str(tmp_path))


def test_hardware_is_named_by_a_path_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    shutil.copy(check_named("hardware", "h200"), path)
    named = settings(["hardware=h200", "model=smollm2"])
    found = settings([f"hardware={path}", "model=smollm2"])
    assert found == named
    assert helix.plan("smollm2", str(path), 4).best == helix.plan("smollm2", "h200", 4).best


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hardware=/nowhere/mine.yaml"],
            "there is no hardware=/nowhere/mine.yaml; choose one of: auto, cpu, dgx_a100",
        ),
        (
            ["goal=tpot"],
            "goal=tpot is none of mode=forward; choose mode=generate, which has it, or one of: throughput",
        ),
        (["parallel.goal=tpot"], "there is no key parallel.goal here; write goal=tpot"),
    ],
)
def test_what_a_plan_is_told_is_refused_with_what_to_write(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
