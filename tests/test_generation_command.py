"""`infer.py` with a prompt, as a user runs it: tiny models in folders, and SmolLM2 once."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import ROOT, Command
from ranks import on_ranks
from texts import tokenizer, write_folder
from transformers import AutoModelForCausalLM
from wandb_runs import wandb_records

from helix.config.folder import shape_of

PROMPTS = ["Hello, world!", "A", "longer than the others"]
# infer.py with a standard output that nobody reads.
CLOSED = f"""
import os, runpy, sys
reads, writes = os.pipe()
os.dup2(writes, 1)
os.close(reads)
os.close(writes)
sys.stdout = open(1, "w", closefd=False)
runpy.run_path({str(ROOT / "infer.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_folder(tmp_path_factory.mktemp("models") / "tiny", chat=True)
    # Of another kind than the one that is cut; it does not count.
    about = json.loads((made / "generation_config.json").read_text()) | {"cache_implementation": "static"}
    (made / "generation_config.json").write_text(json.dumps(about))
    return made


def start(run_dir: Path, folder: Path, m: int, n: int, *overrides: str, script: str = "infer.py") -> Command:
    grid = ["parallel=helix", f"parallel.m={m}", f"parallel.n={n}"]
    own = [f"hydra.run.dir={run_dir}", "model=pretrained", f"model.path={folder}", "generate.max_new_tokens=9"]
    return Command(script, *own, "workload.runs=2", *grid, *overrides)


def test_answers_depend_on_what_was_said_before(folder: Path) -> None:
    """Or else equal tokens would prove nothing: each prompt's answer is another one without the tokens before."""

    def answers(seen: int) -> list[list[int]]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        found = []
        for text in PROMPTS:
            ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
            for _ in range(5):
                ids.append(int(model(torch.tensor([ids[-seen:]])).logits[0, -1].argmax()))
            found.append(ids[-5:])
        return found

    everything, (last, few) = on_ranks(1, answers, 64)[0], on_ranks(1, lambda: (answers(1), answers(3)))[0]
    for each in zip(everything, last, few, strict=True):
        assert each[0] not in each[1:]


def run(run_dir: Path, folder: Path, m: int, n: int, *overrides: str) -> tuple[dict[str, Any], str]:
    process = start(run_dir, folder, m, n, *overrides)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert err == ""
    return json.loads((run_dir / "report.json").read_text()), out


def test_a_batch_of_unequal_prompts(tmp_path: Path, folder: Path) -> None:
    """Every figure of the contract; bytes and memory on their closed forms; answers in the order of the prompts."""
    prompts = PROMPTS
    report, out = run(tmp_path, folder, 2, 2, f"prompt={PROMPTS}", "workload.batch_size=2")
    assert report["method"] == {
        "name": "helix_2x2", "m": 2, "n": 2, "data": 1, "stage": 1,
        "schedule": {"prefill": "batch", "decode": "batch"},
    }  # fmt: skip
    assert report["accuracy"] == {
        "reference": "transformers_single", "relative_error": pytest.approx(0, abs=1e-5), "tokens_equal": True,
        "differing_prompts": [],
    }  # fmt: skip
    for key in ("ttft_ms", "tpot_ms", "tokens_per_s", "step_ms", "comm_ms_per_token"):
        assert len(report[key]["runs"]) == 2
        assert report[key]["ci95"][0] <= report[key]["mean"] <= report[key]["ci95"][1]
    for key in ("comm_bytes_per_rank_per_step", "prefill_bytes_per_rank"):
        assert report[key]["executed"] == report[key]["predicted"] != {}
    assert report["collectives"]["per_step"] == 2 * 4 + 2
    assert report["collectives"]["per_layer"] == 4
    assert 0 < report["collectives"]["share_of_step"]["mean"] < 1
    of_one = [each * report["collectives"]["per_step"] / 1e3 for each in report["collectives"]["transfer_us"]["runs"]]
    assert report["comm_ms_per_token"]["runs"] == pytest.approx(of_one)  # a step gives each answer one token
    memory = report["memory_bytes_per_rank"]
    assert memory["weights"] == memory["predicted"]
    assert memory["peak"] >= memory["weights"] + memory["kv_cache"] > memory["kv_cache"] > 0
    about = report["generation"]
    assert about["prompts"] == prompts
    assert about["prompt_tokens"] == [len(each) for each in prompts]
    assert [f"[{number}] {prompt}" in out for number, prompt in enumerate(prompts, 1)] == [True] * 3
    assert len(about["answers"]) == 3
    assert "Every token is the one" in " ".join(out.split())
    records = wandb_records(tmp_path / report["wandb"]["path"])
    assert len([record for record in records if record["type"] == "history"]) == 2
    assert records[-1]["exit"]["exit_code"] == 0


def test_one_prompt_is_streamed_and_one_slice_holds_each_token(tmp_path: Path, folder: Path) -> None:
    cut = ["parallel.schedule=rows", "parallel.decode=kvseq", "precision=bf16-true", "logger=none"]
    report, out = run(tmp_path, folder, 2, 1, "prompt=Hi, you", "generate.chat=true", *cut)
    assert report["method"]["schedule"] == {"prefill": "rows", "decode": "kvseq"}
    assert out.startswith("Hi, you\n")
    assert report["generation"]["answers"][0][:2] in out
    memory = report["memory_bytes_per_rank"]
    assert memory["kv_cache"] == memory["kv_cache_predicted"]
    assert memory["weights"] == memory["predicted"]
    assert report["generation"]["prompt_tokens"] == [len("Hi, you") + 2]


def test_methods_take_turns(tmp_path: Path, folder: Path) -> None:
    """transformers' own tensor parallelism and one process beside Helix; the same draws by the same seed."""
    words = ["baseline=[hf_tp2,single,helix_2x1]", "generate.temperature=0.7", "generate.top_p=0.9", "logger=none"]
    report, out = run(tmp_path, folder, 1, 2, "prompt=Hi", *words, "generate.stop=[zzz]", "seed=3")
    by_name = {each["method"]["name"]: each for each in report["baselines"]}
    assert list(by_name) == ["hf_tp2", "single", "helix_2x1"]
    for each in (report, *by_name.values()):
        assert each["accuracy"]["tokens_equal"]
        assert len(each["tpot_ms"]["runs"]) == len(each["ttft_ms"]["runs"]) == 2
    for each in by_name.values():
        assert each["paired"]["pairs"] == each["paired_ttft"]["pairs"] == 2
    assert by_name["single"]["idle_ranks"] == 1
    assert by_name["single"]["comm_bytes_per_rank_per_step"] == {"executed": {}, "predicted": None}
    assert by_name["hf_tp2"]["comm_bytes_per_rank_per_step"]["executed"]
    assert "helix_1x2 is x" in out


def test_a_method_that_refuses_has_its_own_words_and_a_reader_that_leaves_ends_nothing(
    tmp_path: Path, folder: Path
) -> None:
    """More ranks than KV heads; one token, after which there is no time of a further one; a pipe that is closed."""
    script = tmp_path / "closed.py"
    script.write_text(CLOSED)
    words = ["baseline=[hf_tp4]", "generate.max_new_tokens=1", "generate.verify=false", "logger=none", "prompt=Hi"]
    process = start(tmp_path, folder, 2, 2, *words, script=str(script))
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert err == ""
    report = json.loads((tmp_path / "report.json").read_text())
    (refused,) = report["baselines"]
    assert refused["method"]["name"] == "hf_tp4"
    assert refused["error"]
    assert report["tpot_ms"] is None
    assert report["accuracy"] == {"reference": "not_verified", "relative_error": None}
    assert report["comm_bytes_per_rank_per_step"] == {"executed": {}, "predicted": {}}


def test_a_sweep_over_grids(tmp_path: Path, folder: Path) -> None:
    own = [f"hydra.sweep.dir={tmp_path}", "model=pretrained", f"model.path={folder}", "generate.max_new_tokens=3"]
    words = ["workload.runs=2", "parallel=helix_2x1,helix_1x4", "prompt=Hi", "logger=none"]
    process = Command("infer.py", "-m", *own, *words, env={"COLUMNS": "80"})
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    header, helix = ([line for line in out.splitlines() if word in line][-1] for word in ("TPOT ms", "helix_2x1"))
    assert header.split()[-1] == "tokens"
    assert helix.split()[-1] == "equal"
    assert "n=4 does not divide kv_heads=2" in " ".join(out.split())


def test_a_killed_rank_ends_it(tmp_path: Path, folder: Path) -> None:
    endless = ["prompt=Hi", "workload.iterations=100000", "generate.verify=false"]
    process = start(tmp_path, folder, 2, 1, *endless)
    deadline = time.monotonic() + 60
    history = tmp_path / "history.jsonl"
    while not (history.exists() and history.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # W&B's own process gets each record after that
    ranks = sorted(child.pid for child in psutil.Process(process.pid).children())[-2:]
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    said = r"infer.py: error: rank 1 \(host .*\) was killed by SIGKILL during .*; the other ranks were stopped"
    assert re.fullmatch(said, err.splitlines()[-1])
    assert not [pid for pid in ranks if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert not (tmp_path / "report.json").exists()
    records = wandb_records(next((tmp_path / "wandb").glob("offline-run-*")))
    assert [record for record in records if record["type"] == "history"]
    assert records[-1]["exit"]["exit_code"] != 0


@pytest.mark.smollm2
def test_smollm2_on_twelve_ranks(tmp_path: Path) -> None:
    """Nine heads and three KV heads on twelve ranks: the tokens of one process."""
    prompts = "prompt=['The capital of France is','def f(x):']"
    words = ["model=smollm2", prompts, "generate.max_new_tokens=3", "workload.runs=2"]
    process = Command("infer.py", f"hydra.run.dir={tmp_path}", *words, "logger=none")
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world_size"] == 12
    assert report["accuracy"]["tokens_equal"]
    assert report["accuracy"]["relative_error"] < 1e-4
    assert report["generation"]["answers"][0].startswith(" Paris")
    assert " Paris" in out
    for key in ("comm_bytes_per_rank_per_step", "prefill_bytes_per_rank"):
        assert report[key]["executed"] == report[key]["predicted"]
    assert shape_of(Path(report["model"]["folder"])).kv_heads == 3
