"""`ckpt=` of infer.py: every method runs with the weights that were trained, or says why it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpointed import change, optimizer_of
from ranks import on_ranks

from helix.checkpoint.asked import check_checkpoint
from helix.checkpoint.content import About, CheckpointError, Manifest
from helix.checkpoint.manifest import write
from helix.checkpoint.restoring import open_checked
from helix.checkpoint.save_and_load import export, import_, save
from helix.comm.mesh import Mesh
from helix.config.methods import from_name
from helix.config.schema import ConfigError, Misfit, ModelConfig, ParallelConfig
from helix.models.transformer import Transformer
from helix.parallel.methods.build import build
from helix.parallel.methods.method import Job, Layout
from helix.partition.function import Function
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.study.accuracy import Oracle, relative_error

MOE = TransformerShape(2, 32, heads=4, kv_heads=4, head_dim=8, mlp_hidden=16, vocab=256, qk_norm=True, experts=4)
DENSE = replace(MOE, experts=0)
MODEL = ModelConfig("some", layers=2, width=32, heads=4, head_dim=8, mlp_hidden=16, qk_norm=True)
PERSLICE = AttentionOptions(schedule="perslice")


def _save(folder: Path, shape: TransformerShape, options: AttentionOptions | None = None) -> None:
    """Trained weights, norms included, of a LightningModule's kind: the model is a part of what is saved."""
    model = Transformer(shape, Mesh(Grid(2, dist.get_world_size() // 2)), options or AttentionOptions())
    model.init_weights(0)
    change(model)
    save(folder, torch.nn.ModuleDict({"model": model}), [optimizer_of(model)], step=9)


def _errors(folder: Path, shape: TransformerShape, methods: dict[str, Layout]) -> dict[str, tuple[float, float] | str]:
    """On rank 0, of each method's logits: from the reference with the same weights, and with those of the seed."""
    _save(folder, shape)
    drawn = Job(shape, 4, 8, torch.float64, torch.device("cpu"), seed=0)
    job = replace(drawn, weights=open_checked(folder / "00001-step-9"))
    tokens = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(1))
    answers = [Oracle(each, tokens).answer(Function())[0] for each in (job, drawn)]
    found: dict[str, tuple[float, float] | str] = {}
    for name, layout in methods.items():
        try:
            method = build(name.partition(" ")[0], job, layout)
        except CheckpointError as error:
            found[name] = str(error)
            continue
        with torch.inference_mode():
            logits = method.whole_logits(method.step(tokens))
        if dist.get_rank() == 0:
            assert logits is not None
            errors = [relative_error(logits, each) for each in answers if each is not None]
            found[name] = (errors[0], errors[1])
    return found


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_every_method_runs_with_the_weights_that_were_trained(tmp_path: Path, shape: TransformerShape) -> None:
    spread = 4 if shape.experts else 1
    methods = {
        "helix": Layout(Grid(4, 1), ep_size=spread),
        "helix perslice": Layout(Grid(4, 1), options=PERSLICE, ep_size=spread),
        "single": Layout(Grid(1, 1)),
        "data": Layout(Grid(1, 1), data=4, ep_size=spread),
        "tensor": Layout(Grid(1, 4), ep_size=spread),
        "ulysses": Layout(Grid(1, 4), ep_size=spread),
    }
    found = on_ranks(4, _errors, tmp_path, shape, methods)[0]
    refused = found.pop("helix perslice")
    assert "parallel.schedule=perslice parallel.m=4, which is another function of the same weights" in refused
    for same, to_drawn in found.values():
        assert same <= 1e-6  # the router's fp32
        assert to_drawn > 0.1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    on_ranks(2, _save, folder / "exact", DENSE)
    on_ranks(2, _save, folder / "perslice", DENSE, PERSLICE)
    on_ranks(2, _save, folder / "block", DENSE, AttentionOptions(projection="block"))
    return folder


def _helix(m: int, n: int, **options: str) -> ParallelConfig:
    return ParallelConfig("helix", m, n, **options)


@pytest.mark.parametrize(
    ("which", "parallel"),
    [
        ("exact", _helix(1, 4)),
        ("exact", _helix(1, 4, schedule="perslice")),  # which one slice makes the exact one
        ("exact", from_name("tp4")),
        ("perslice", _helix(2, 2, schedule="perslice")),
        ("block", _helix(2, 1, projection="block")),
    ],
)
def test_what_computes_the_trained_function_is_taken(trained: Path, which: str, parallel: ParallelConfig) -> None:
    assert check_checkpoint(str(trained / which), MODEL, parallel) == trained / which / "00001-step-9"


@pytest.mark.parametrize(
    ("which", "model", "parallel", "reason"),
    [
        ("exact", replace(MODEL, width=64, layers=3), _helix(2, 1), "with model.layers=2 model.width=32, and "
         "model=some here has model.layers=3 model.width=64; set model.layers=2 model.width=32"),
        ("exact", replace(MODEL, kind="moe", experts=4), _helix(2, 1), "set model.kind=dense model.experts=0"),
        ("exact", MODEL, _helix(2, 1, schedule="perslice"), "set parallel.schedule=auto"),
        ("perslice", MODEL, _helix(2, 1), "set parallel.schedule=perslice parallel.m=2"),
        ("perslice", MODEL, _helix(4, 1, schedule="perslice"), "set parallel.m=2"),
        ("perslice", MODEL, from_name("single"), "set parallel.schedule=perslice parallel.m=2 with parallel=helix"),
        ("block", MODEL, _helix(1, 2, projection="block"), "set parallel.m=2 parallel.n=1"),
        ("block", MODEL, _helix(2, 1), "set parallel.m=2 parallel.n=1 parallel.projection=block"),
        ("exact", MODEL, _helix(2, 1, aggregate="concat"), "set parallel.aggregate=project"),
    ],
)  # fmt: skip
def test_another_model_or_function_is_refused(
    trained: Path, which: str, model: ModelConfig, parallel: ParallelConfig, reason: str
) -> None:
    with pytest.raises(Misfit) as refused:
        check_checkpoint(str(trained / which), model, parallel)
    assert str(refused.value).startswith(f"ckpt={trained / which / '00001-step-9'} was trained with ")
    assert str(refused.value).endswith(reason)


def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing is not a folder; give a checkpoint, a folder of them, or null"):
        check_checkpoint(str(tmp_path / "missing"), MODEL, _helix(2, 1))
    with pytest.raises(ConfigError, match=r"it has no manifest\.json, which is written last"):
        check_checkpoint(str(tmp_path), MODEL, _helix(2, 1))


def test_a_model_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    write(Manifest({}, {}, About(models={"model": {"shape": 3}})), tmp_path)
    with pytest.raises(Misfit, match="what the checkpoint says of its model makes no sense"):
        check_checkpoint(str(tmp_path), MODEL, from_name("single"))


def test_an_exported_file_keeps_what_was_trained(trained: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    export(trained / "perslice", first)
    import_(first, tmp_path / "again")
    export(tmp_path / "again", second)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(Misfit, match=r"set parallel\.schedule=perslice parallel\.m=2$"):
        check_checkpoint(str(tmp_path / "again"), MODEL, _helix(2, 1))


def _run(*arguments: object) -> tuple[int, str]:
    from commands import Command

    process = Command("infer.py", *map(str, arguments))
    _, err = process.communicate(timeout=60)
    assert process.returncode is not None
    return process.returncode, err


def test_the_report_says_whose_weights_they_were(trained: Path, tmp_path: Path) -> None:
    sizes = [f"model.{key}={getattr(MODEL, key)}" for key in ("layers", "width", "heads", "head_dim", "mlp_hidden")]
    same = ["model=dense", *sizes, "model.qk_norm=true", "logger=none", "workload.batch_size=2", "workload.seq_len=8"]
    same += ["workload.runs=2", "workload.iterations=1", "parallel=helix", "parallel.m=2", "parallel.n=1"]
    code, err = _run(f"ckpt={trained / 'exact'}", *same, f"hydra.run.dir={tmp_path}")
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["checkpoint"] == {"path": str(trained / "exact" / "00001-step-9"), "step": 9}
    assert report["accuracy"]["relative_error"] <= 1e-5
    code, err = _run(f"ckpt={trained / 'perslice'}", *same, f"hydra.run.dir={tmp_path / 'refused'}")
    assert code == 2
    assert err.count("\n") == 1
    assert "set parallel.schedule=perslice parallel.m=2" in err
    assert not (tmp_path / "refused").exists()
