"""`python -m helix verify` and `helix.verify`: what they print, write, refuse and end with; the bounds' arithmetic."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutations import MUTATIONS
from ranks import on_ranks
from rich.console import Console

import helix
from helix import Grid, PartitionError
from helix.__main__ import main
from helix.certify.answers import DTYPES, deviation, exact
from helix.certify.bounds import UNIT_ROUNDOFF, WIDE, Roundings, scales
from helix.certify.cases import Case, subject_of
from helix.certify.certificate import Certificate, Check, Copy, Found, Row, Traffic
from helix.certify.table import render
from helix.config import environment
from helix.config.schema import ConfigError
from helix.partition.shape import TransformerShape

SMALL = ("parallel=helix_2x1", "model=tiny", "--precisions", "fp32")
SHAPE = TransformerShape(1, 24, heads=4, kv_heads=2, head_dim=8, mlp_hidden=24, vocab=50, qk_norm=True)


def ended(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        main(["verify", *words])
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, *capfd.readouterr()


def test_what_is_exact_is_certified(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended([*SMALL, "--json", str(tmp_path / "c.json")], capfd)
    assert err == ""
    assert code == 0
    assert "✓ helix_2x1 is exact here: 16 of 16 cases" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["passed"]
    assert found["failures"] == []
    assert (found["backend"], found["world_size"], len(found["hosts"])) == ("gloo", 2, 2)
    assert {"versions", "machine", "git_commit", "command", "made_at", "grid", "subject", "devices"} <= set(found)
    schedules = {case["case"]["schedule"] for case in found["cases"] if case["case"]["what"] == "layer"}
    assert schedules == {"perslice", "batch", "heads", "rows", "gather", "score"}
    (layer,) = (
        each for each in found["cases"] if each["case"]["what"] == "layer" and each["case"]["schedule"] == "rows"
    )
    assert [set(rank["tensors"]) for rank in layer["ranks"]] == [
        {"output", "gradient of the input", *(f"gradient of w{name}" for name in "qkvo")}
    ] * 2
    assert all(count["executed"] == count["predicted"] > 0 for rank in layer["ranks"] for count in rank["bytes"])


def test_what_is_wrong_ends_with_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The patch is in place when the ranks are forked. What was found is written all the same."""
    (mutation,) = (each for each in MUTATIONS if each.name == "mask left out")
    words = ["parallel.schedule=heads", *SMALL, "--json", str(tmp_path / "c.json")]
    with mutation.patch():
        code, out, err = ended(words, capfd)
    assert code == 1, err
    (sentence,) = err.splitlines()
    form = (
        r".*helix_2x1 is not exact here in 2 of 6 cases; rank \d, layer, heads, fp32: the output is off by \S+, and "
        r"rounding explains \S+"
    )
    assert re.fullmatch(form, sentence), sentence
    assert "✗ helix_2x1 is not exact here: 2 of 6 cases failed" in out
    assert not json.loads((tmp_path / "c.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["parallel=tp16"],
            "verify is about m x n grids, and parallel.method=tensor is none; take parallel=helix_4x4",
        ),
        (["parallel=helix_2x2_dp2", "model=tiny"], "verify holds one replica, so parallel.data must be 1, not 2"),
        (["parallel=helix_4x4", "model.kv_heads=2"], "legal (m, n) on 16 ranks: (8, 2), (16, 1)"),
        (["parallel=helix_3x1", "model=tiny"], "parallel=helix_3x1"),
        (["dense"], "'dense' is no setting; write KEY=VALUE, as parallel=helix_4x4 or model=dense"),
        (["parallel=helix_2x2", "model=tiny", "model.kv_heads=2", "parallel.schedule=heads"], "legal: auto, perslice"),
        (["parallel=helix_2x1", "--precisions", "fp32,fp8"], "there is no precision 'fp8'; choose of: fp64,"),
        (["parallel=helix_2x1", "device=cuda"], "device=cuda needs a GPU for each of 2 ranks"),
        (["parallel=helix_64x16", "model.head_dim=64"], "is 1024 ranks, and this machine takes"),
        (["ckpt=x"], "ckpt=x is not read by verify, which draws its weights and inputs; leave it out"),
        (["--json", "/nowhere/c.json"], "--json /nowhere/c.json: there is no folder /nowhere"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helix.certify.run.launch", lambda *args, **kwargs: pytest.fail("something was launched"))
    code, out, err = ended(words, capfd)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def _in_a_launch() -> list[tuple[bool, int, str]]:
    """Both kinds of call on ranks that are there."""
    found = [helix.verify(Grid(2, 1), SHAPE, "rows", ("fp32",)), helix.verify(Grid(1, 2), "tiny", "batch", ("bf16",))]
    return [(each.passed, len(each.rows), each.verdict()) for each in found]


def test_ranks_that_are_there_verify_themselves() -> None:
    ranks = on_ranks(2, _in_a_launch)
    assert ranks[0] == ranks[1]
    assert [passed for passed, _, _ in ranks[0]] == [True, True]
    assert ranks[0][0][2] == f"helix_2x1 is exact here in {ranks[0][0][1]} of {ranks[0][0][1]} cases"


def test_what_cannot_be_verified_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no precision 'fp8'; choose of: fp64, fp32, bf16, fp16"):
        helix.verify(Grid(2, 1), SHAPE, precisions=("fp8",))
    with pytest.raises(PartitionError, match="schedule=heads cannot run on helix_4x1"):
        helix.verify(Grid(4, 1), SHAPE, "heads")
    with pytest.raises(PartitionError, match="n=4 does not divide kv_heads=2"):
        helix.verify(Grid(1, 4), SHAPE)


def test_gpus_that_are_dealt_out_by_task_are_refused_instead_of_verifying_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("helix.certify.run.launch", lambda *args, **kwargs: pytest.fail("something was launched"))
    monkeypatch.setattr(environment, "gpus", lambda: 1)
    for name, value in {"SLURM_GPUS_PER_TASK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="ask for --gpus-per-node, or choose device=cpu"):
        helix.verify(Grid(2, 1), SHAPE)


def _certificate(*found: Found) -> Certificate:
    subject = subject_of(SHAPE, Grid(2, 1))
    rows = (Row(Case("layer", "rows", "fp32"), found),)
    return Certificate(subject, rows, "gloo", ("host",) * 2, ("x86_64",) * 2, omitted=("this and that",))


def test_each_kind_of_failure_names_its_rank() -> None:
    right = Found((Check("output", 1e-9, 1e-6),), (Traffic("forward", "all_gather/x", 8, 8),), (Copy("y", "all", 1),))
    assert _certificate(right, right).passed
    wrong = {
        "rank 1, layer, rows, fp32: the output is off by inf, and rounding explains 1.0e-06": replace(
            right, checks=(Check("output", math.inf, 1e-6),)
        ),
        "rank 1, layer, rows, fp32: sent 9 bytes of all_gather/x (forward), and 8 are predicted": replace(
            right, traffic=(Traffic("forward", "all_gather/x", 9, 8),)
        ),
        "rank 1, layer, rows, fp32: the y differs from that of other ranks of all": replace(
            right, copies=(Copy("y", "all", 2),)
        ),
    }
    for sentence, found in wrong.items():
        certificate = _certificate(right, found)
        assert certificate.failures == [sentence]
        assert not certificate.passed
        assert certificate.verdict().endswith(f"in 1 of 1 cases; {sentence}")
    assert json.loads(json.dumps(_certificate(right, right).as_dict()))["passed"]


def test_an_infinite_error_is_written(tmp_path: Path) -> None:
    found = Found((Check("output", math.inf, 1e-6),), ())
    _certificate(found, found).write(tmp_path / "c.json")
    tensors = json.loads((tmp_path / "c.json").read_text())["cases"][0]["ranks"][0]["tensors"]
    assert tensors == {"output": {"error": None, "bound": 1e-6}}


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int) -> None:
    checks = (Check("logits", 4.6e-7, 4e-5), Check("gradient of blocks.0.mlp.experts.12.down", 7.8e-7, 7e-5))
    found = Found(checks, (Traffic("forward", "all_gather/x", 999_400, 999_400),))
    certificate = _certificate(found, found)
    rows = tuple(replace(certificate.rows[0], case=Case(what, "perslice", "fp32")) for what in ("layer", "model"))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(replace(certificate, rows=rows), "dense"))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.rstrip().endswith("✓") for line in lines) == 2
    assert "Not verified: this and that." in lines


def test_inputs_are_exact_in_every_precision() -> None:
    values = torch.cat([torch.randn(10_000), torch.randn(10_000) * 2.0**-20])
    held = exact(values)
    for dtype in DTYPES.values():
        assert torch.equal(held.to(dtype).double(), held)


def test_a_bound_is_what_it_says() -> None:
    """The sum of k terms, of which a random one's error stays below, and one that is rounded to less does not."""
    assert Roundings(sums=100).bound("fp64") == WIDE * 10 * 2.0**-53
    assert Roundings(sums=100).bound("bf16") == WIDE * 10 * 2.0**-24  # accumulated in fp32
    assert Roundings(stores=3, partials=2).bound("bf16") == WIDE * 2 * 2.0**-8
    assert Roundings(sums=1).bound("fp64", least="fp32") == WIDE * 2.0**-24
    for name, dtype in DTYPES.items():
        assert torch.finfo(dtype).eps == 2 * UNIT_ROUNDOFF[name]
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    whole = x.double() @ w.double()
    scale, bound = float(whole.abs().max()), Roundings(sums=256, stores=1).bound("fp32")
    assert bound / 1000 < deviation(x @ w, whole, scale) < bound
    assert deviation((x.bfloat16() @ w.bfloat16()).float(), whole, scale) > bound


def test_gradients_through_the_scores_are_held_against_their_terms() -> None:
    found = scales({"wq": 0.0, "wk": 9.0, "wv": 2.0, "q_norm": 1.0, "x": 3.0}, heads=4)
    assert found == {"wq": 2.0, "wk": 9.0, "wv": 2.0, "q_norm": 4.0, "x": 3.0}
    nested = scales({"blocks.0.attention.wq": 0.5, "blocks.0.attention.wv": 2.0, "head.weight": 1.0}, heads=4)
    assert nested["blocks.0.attention.wq"] == 2.0


def test_a_deviation_is_never_small_by_accident() -> None:
    whole = torch.tensor([1.0, -4.0]).double()
    assert deviation(torch.tensor([1.5, -4.0]), whole, 4.0) == 0.125
    for value in ([1.0, math.nan], [math.inf, -4.0], [1.0]):
        assert deviation(torch.tensor(value), whole, 4.0) == math.inf
    assert deviation(None, whole, 4.0) == math.inf
    assert deviation(torch.zeros(2), torch.zeros(2).double(), 0.0) == 0.0
    assert deviation(torch.ones(2), torch.zeros(2).double(), 0.0) == math.inf
