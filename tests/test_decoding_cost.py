"""What a pretrained model costs a rank while it generates: every byte predicted, none of them growing with context."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pretrained
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks

from helix import Grid, PartitionError
from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.partition.decoding import GenerationCost
from helix.partition.families import PretrainedShape, describe
from helix.partition.phases import DECODE, PREFILL, Phases, check, resolve
from helix.pretrained.cache import DealtLayer
from helix.pretrained.helixify import helixify

SMOLLM2 = PretrainedShape(
    family="llama",
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_hidden=1536,
    vocab=49152,
    context=8192,
    tied=True,
)
CASES = [
    # family, grid, phases, batch, tokens of the prompt: 2 KV heads, so m = 4 is more than a head group has
    ("llama", Grid(4, 1), Phases(), 1, 256),
    ("llama", Grid(4, 1), Phases(), 1, 4096),
    ("llama", Grid(4, 1), Phases(), 3, 256),
    ("llama", Grid(4, 1), Phases(), 3, 4096),
    ("llama", Grid(4, 1), Phases(), 3, 257),
    ("llama", Grid(4, 1), Phases(), 4, 50),
    ("llama", Grid(4, 1), Phases(), 1, 1),
    ("llama", Grid(4, 1), Phases("rows", "kvseq"), 2, 2),
    ("llama", Grid(2, 2), Phases(), 1, 33),
    ("llama", Grid(2, 2), Phases("batch", "kvseq"), 2, 33),
    ("llama", Grid(1, 2), Phases(), 1, 33),
    ("gpt2", Grid(4, 1), Phases("rows", "heads"), 1, 30),
    ("gpt2", Grid(2, 2), Phases("heads", "kvseq"), 3, 30),
    ("qwen2_moe", Grid(2, 2), Phases(), 1, 33),
    ("mixtral", Grid(4, 1), Phases(), 1, 33),
]


def measure(family: str, grid: Grid, phases: Phases, batch: int, length: int) -> dict[str, int]:
    """Hold a prompt's bytes, two steps' bytes, the number of collectives, the cache and the weights to the forms.

    Returns:
        The bytes of the last step.
    """
    sizes = {} if family == "gpt2" else {"max_position_embeddings": 8192}
    model = pretrained.tiny(family, dtype=torch.float32, **sizes)
    shape, rank = describe(model.config.to_dict()), torch.distributed.get_rank()
    mesh = Mesh(grid, data=4 // grid.ranks)
    helixify(model, mesh, phases)
    resolved = resolve(phases, grid.m, shape.kv_heads // grid.n, batch)
    cost = GenerationCost(shape, grid, resolved, batch, itemsize=4)
    rank %= grid.ranks
    ids = torch.randint(3, pretrained.VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length + 2).expand(batch, -1)
    with torch.inference_mode(), record() as prompt:
        out = model(ids, position_ids=positions[:, :length], logits_to_keep=1)
    cache = out.past_key_values
    for step in range(2):
        assert held_bytes(cache) == cost.cache_bytes(length + step, rank)
        with torch.inference_mode(), record() as decoded:
            position_ids = positions[:, length + step : length + step + 1]
            model(ids[:, :1], past_key_values=cache, position_ids=position_ids)
        assert dict(decoded.bytes) == cost.step_bytes(), "a decode step's bytes"
        extra = len(cost.step_bytes().keys() & {"all_reduce/positions.leave"})
        within = 4 if grid.m > 1 else 2
        assert sum(decoded.calls.values()) == within * shape.layers + 2 + extra
    assert +Counter(prompt.bytes) == cost.prefill_bytes(length, rank), "a prompt's bytes"
    held = sum(p.nbytes for name, p in model.named_parameters() if not name.endswith(".bias"))
    assert held == cost.weight_bytes(), f"weights of {held} bytes"
    return dict(decoded.bytes)


def held_bytes(cache: object) -> int:
    layers: list[DealtLayer] = cache.layers  # type: ignore[attr-defined]
    return sum(layer.held_bytes for layer in layers)


def _measure_all() -> tuple[list[str], dict[int, dict[str, int]]]:
    """What failed, and the bytes of one sample's step after so many tokens."""
    failures, steps = [], {}
    for case in CASES:
        try:
            moved = measure(*case)
        except AssertionError as error:
            failures.append(f"{case}: {error}")
        else:
            if case[:4] == CASES[0][:4]:
                steps[case[4]] = moved
    return failures, steps


@pytest.fixture(scope="module")
def measured() -> list[tuple[list[str], dict[int, dict[str, int]]]]:
    return on_ranks(4, _measure_all, timeout_s=60)


def test_every_byte_of_a_prompt_and_of_a_step_is_predicted(
    measured: list[tuple[list[str], dict[int, dict[str, int]]]],
) -> None:
    """Also that a step has four collectives a layer and two more, and that weights and cache are what they should."""
    for failures, _ in measured:
        assert not failures, "\n".join(failures)


def test_a_step_at_4096_tokens_costs_what_it_costs_at_256(
    measured: list[tuple[list[str], dict[int, dict[str, int]]]],
) -> None:
    for _, steps in measured:
        assert sum(steps[256].values()) > 0
        assert steps[4096] == steps[256]


def test_what_a_step_of_smollm2_sends() -> None:
    cost = GenerationCost(SMOLLM2, Grid(4, 3), Phases("rows", "kvseq"), 1, 4)
    assert cost.step_bytes() == {
        # Of 3 + 1 + 1 heads a slice of 16, to 3 others; of 576 numbers a twelfth, to 11 others, there and back.
        "all_gather/attention.qkv": 30 * 3 * 5 * 16 * 4,
        "all_to_all/attention.merge": 30 * 3 * 3 * (16 + 1) * 4,
        "all_reduce/attention.leave": 30 * 2 * 11 * 48 * 4,
        "all_reduce/mlp.leave": 30 * 2 * 11 * 48 * 4,
        "all_reduce/embedding.leave": 2 * 11 * 48 * 4,
        "all_gather/head.leave": 11 * 4096 * 4,
    }


@pytest.mark.parametrize("grid", [Grid(4, 3), Grid(1, 3), Grid(2, 3), Grid(8, 1), Grid(16, 1)])
def test_a_rank_of_smollm2_has_its_share_of_weights_and_cache(grid: Grid) -> None:
    phases = resolve(Phases(), grid.m, SMOLLM2.kv_heads // grid.n, 1)
    cost = GenerationCost(SMOLLM2, grid, phases, 1, 4)
    whole = GenerationCost(SMOLLM2, Grid(1, 1), Phases("batch", "batch"), 1, 4)
    assert whole.weight_bytes() == 538_060_032  # as its model.safetensors
    norms = 61 * 576 * 4
    assert cost.weight_bytes() - norms == pytest.approx((whole.weight_bytes() - norms) / grid.ranks, rel=0.001)
    assert cost.cache_bytes(4096) * grid.ranks == whole.cache_bytes(4096) == 2 * 30 * 4096 * 192 * 4
    held = [cost.cache_bytes(4097, rank) for rank in range(grid.ranks)]
    assert sum(held) == whole.cache_bytes(4097)
    assert max(held) - min(held) <= 2 * 30 * (192 // grid.n) * 4


@st.composite
def costs(draw: st.DrawFn) -> GenerationCost:
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    kv_heads = n * draw(st.integers(1, 6))
    shape = dataclasses.replace(
        SMOLLM2,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=m * draw(st.integers(1, 8)),
        layers=1,
    )
    return GenerationCost(shape, Grid(m, n), Phases(), draw(st.integers(1, 12)), draw(st.sampled_from([2, 4])))


@given(costs(), st.integers(1, 40))
def test_auto_takes_what_sends_least(cost: GenerationCost, length: int) -> None:
    """Of the legal ones, by the busiest rank's bytes."""
    m, kv_heads = cost.grid.m, cost.shape.kv_heads // cost.grid.n
    found = resolve(Phases(), m, kv_heads, cost.batch)

    def legal(prefill: str, decode: str) -> bool:
        try:
            check(Phases(prefill, decode), m, kv_heads, cost.batch)
        except PartitionError:
            return False
        return True

    def worst(phases: Phases) -> tuple[int, int]:
        asked = dataclasses.replace(cost, phases=phases)
        prompts = (sum(asked.prefill_bytes(length, rank).values()) for rank in range(cost.grid.ranks))
        return max(prompts), sum(asked.step_bytes().values())

    prompt, step = worst(found)
    for name in PREFILL:
        if legal(name, "auto"):
            assert prompt <= worst(Phases(name, found.decode))[0]
    for name in DECODE:
        if legal("auto", name):
            assert step <= worst(Phases(found.prefill, name))[1]


@given(costs(), st.integers(1, 40))
def test_ranks_hold_and_send_equal_shares(cost: GenerationCost, length: int) -> None:
    m, kv_heads = cost.grid.m, cost.shape.kv_heads // cost.grid.n
    cost = dataclasses.replace(cost, phases=resolve(Phases(), m, kv_heads, cost.batch))
    whole = dataclasses.replace(cost, grid=Grid(1, 1))
    held = [cost.cache_bytes(length, rank) for rank in range(cost.grid.ranks)]
    assert sum(held) == whole.cache_bytes(length)
    if cost.grid.ranks == 1:
        assert cost.step_bytes() == Counter()


def test_names_that_cannot_run_are_refused_with_those_that_can() -> None:
    with pytest.raises(PartitionError, match=r"^prefill=heads cannot run on m=4: .* group's 1; legal: auto, rows$"):
        check(Phases("heads", "auto"), 4, 1, batch=3)
    with pytest.raises(PartitionError, match=r"^decode=batch .* a batch of 3; legal: auto, kvseq$"):
        check(Phases("auto", "batch"), 4, 1, batch=3)
    with pytest.raises(PartitionError, match=r"^prefill=score .* no such schedule; legal: auto, batch, heads, rows$"):
        check(Phases.of("score"), 1, 1)
    check(Phases("batch", "batch"), 4, 1)  # the batch is not known yet
    assert Phases.of(Phases(decode="heads")) == Phases("auto", "heads")
    assert json.dumps(dataclasses.asdict(resolve(Phases(), 4, 1, 1))) == '{"prefill": "rows", "decode": "kvseq"}'
