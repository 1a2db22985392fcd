"""Every method against the model on one device: logits, and the bytes and weights that its closed forms predict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from ranks import on_ranks

from helix.comm.record import record
from helix.config.methods import from_name
from helix.config.schema import ModelConfig, expert_parallel, to_grid
from helix.models.plain import PlainTransformer
from helix.models.reference import Reference
from helix.parallel.methods.build import build
from helix.parallel.methods.method import Job, Layout
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.rivals import stage_layers
from helix.partition.shape import TransformerShape
from helix.study.trial import local_bytes

pytestmark = pytest.mark.usefixtures("deepspeed")
DENSE = TransformerShape(2, 32, 8, 4, 8, mlp_hidden=48, vocab=40)
MOE = replace(DENSE, experts=4, top_k=1)
BATCH, LENGTH, SEED = 4, 8, 7
BOUND = 1e-10  # fp64 keeps 16 digits; sums in another order lose a few of them


@dataclass
class Outcome:
    error: float | None  # relative, on rank 0
    executed: dict[str, int]
    predicted: dict[str, int]
    weights: tuple[int, int | None]  # held, and by the closed form
    idle: int


def layout_of(name: str, shape: TransformerShape) -> tuple[str, Layout]:
    config = from_name(name)
    model = ModelConfig(
        "test", "moe" if shape.experts else "dense", shape.layers, shape.width, shape.heads, shape.kv_heads,
        shape.head_dim, shape.mlp_hidden, experts=shape.experts,
    )  # fmt: skip
    options = AttentionOptions(schedule="rows" if config.schedule == "auto" else config.schedule,
                               residual=config.residual)  # fmt: skip
    return config.method, Layout(
        to_grid(config), config.data, config.stage, options, expert_parallel(model, config), microbatches=2
    )


@torch.inference_mode()
def run(name: str, shape: TransformerShape) -> Outcome:
    job = Job(shape, BATCH, LENGTH, torch.float64, torch.device("cpu"), SEED)
    method = build(*layout_of(name, shape)[:1], job, layout_of(name, shape)[1])
    tokens = torch.randint(0, shape.vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(SEED))
    logits = method.whole_logits(method.step(tokens))
    with record() as log, method.observed():
        method.step(tokens)
    reference = Reference(shape, Grid(1, 1), AttentionOptions(), dtype=torch.float64)
    reference.init_weights(SEED)
    expected = reference(tokens)
    error = None if logits is None else float((logits - expected).norm() / expected.norm())
    predicted = method.predicted(reference.routes)
    held = sum(local_bytes(p) for p in method.model.parameters()) if method.model else 0
    weights = (held, method.predicted_weight_bytes())
    return Outcome(error, dict(+Counter(log.bytes)), dict(predicted or {}), weights, method.idle_ranks)


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize(
    "name",
    ["helix_2x2", "helix_1x2", "single", "dp4", "dp2", "tp4", "tp4_sp", "tp2_dp2", "tp2_pp2", "tp2_sp_pp2", "tp1_pp2"],
)
def test_a_method_computes_the_model_and_moves_what_is_predicted(name: str, model: str) -> None:
    config = from_name(name)
    ranks = config.m * config.n * config.data * config.stage if name != "single" else 2
    outcomes = on_ranks(ranks, run, name, MOE if model == "moe" else DENSE, timeout_s=30)
    assert outcomes[0].error is not None
    assert outcomes[0].error <= BOUND
    for outcome in outcomes:
        assert outcome.executed == outcome.predicted
        assert outcome.weights[0] == outcome.weights[1]
    assert outcomes[0].idle == (1 if name == "single" else 0)
    if name not in ("single", "dp4", "dp2"):
        assert sum(outcomes[0].executed.values()) > 0


def test_equal_groups_of_two_methods_count_alike() -> None:
    """DTensor may communicate over the first one's."""

    def both() -> tuple[Outcome, Outcome]:
        return run("tp2_dp2", DENSE), run("tp2_pp2", DENSE)

    for outcomes in on_ranks(4, both, timeout_s=40):
        for outcome in outcomes:
            assert outcome.executed == outcome.predicted


def test_a_batch_of_one_leaves_replicas_idle() -> None:
    def one() -> int:
        job = Job(DENSE, 1, LENGTH, torch.float32, torch.device("cpu"), SEED)
        method = build("data", job, Layout(Grid(1, 1), data=2))
        tokens = torch.zeros(1, LENGTH, dtype=torch.long)
        logits = method.whole_logits(method.step(tokens))
        assert (logits is not None) == (torch.distributed.get_rank() == 0)
        return method.idle_ranks

    assert on_ranks(2, one) == [1, 1]


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("tp4", replace(DENSE, heads=2, kv_heads=2), "whole heads, and heads is 2"),
        ("tp2_pp2", replace(DENSE, layers=1), "2 pipeline stages need as many layers, not 1"),
        ("helix_1x4", replace(DENSE, kv_heads=2), "n=4 does not divide kv_heads=2"),
    ],
)
def test_what_cannot_run_says_why(name: str, shape: TransformerShape, says: str) -> None:
    def refused() -> str:
        try:
            run(name, shape)
        except PartitionError as error:
            return str(error)
        return ""

    assert all(says in message for message in on_ranks(4, refused))


def test_a_stage_keeps_its_blocks_by_their_numbers_and_the_ends_beside_it() -> None:
    for stage, kept in enumerate([(["0"], True, False), (["1"], False, False), (["2", "3"], False, True)]):
        model = PlainTransformer(replace(DENSE, layers=4))
        model.keep_layers(stage_layers(4, 3, stage))
        assert (list(model.blocks), model.embedding is not None, model.head is not None) == kept
