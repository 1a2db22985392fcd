"""The partitioned transformer against the whole-weight reference: logits, every gradient, every weight.

All cases of one number of ranks share a launch; each is a test of its own, of the errors that the ranks found.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from helix.comm.mesh import Mesh
from helix.comm.parameters import fill, fill_normal, whole
from helix.models.experts import load_deepspeed
from helix.models.plain import PlainTransformer
from helix.models.reference import Reference
from helix.models.transformer import Transformer
from helix.partition.grid import Grid, shard_range
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

SEED = 7
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
# fp64 keeps 16 digits, fp32 7; sums in another order lose a few of them. A router computes in fp32 whatever the
# model's dtype, and sums on other shapes of tokens, so what its gates scale has fp32's digits.
BOUND = {"fp64": 1e-10, "fp32": 1e-5}
ROUTED_BOUND = {"fp64": 1e-6, "fp32": 1e-5}


@dataclass(frozen=True)
class Case:
    """One model on one grid. The default has uneven everything: 33 tokens, V and F that no grid here divides."""

    name: str
    shape: TransformerShape
    m: int
    n: int
    options: AttentionOptions = field(default_factory=AttentionOptions)
    batch: int = 3
    length: int = 11
    ep_size: int | None = None

    @property
    def id(self) -> str:
        return f"{self.m}x{self.n}-{self.options.residual}-{self.name}"

    @property
    def grid(self) -> Grid:
        return Grid(self.m, self.n)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def dtypes(self) -> tuple[str, ...]:
        """fp64 alone where a case differs from another in its residual stream only, or takes most ranks."""
        return ("fp64",) if self.options.residual == "replicated" or self.grid.ranks == 16 else ("fp64", "fp32")


DENSE = TransformerShape(2, 32, 4, 4, 8, mlp_hidden=51, vocab=37)
GQA = replace(DENSE, kv_heads=2, qk_norm=True, causal=False)
NO_ROPE = replace(DENSE, rope=False)
MOE = replace(DENSE, experts=4, top_k=1, mlp_hidden=20)
MOE_2 = replace(MOE, top_k=2, kv_heads=2)
NINE = TransformerShape(2, 54, 9, 3, 6, mlp_hidden=100, vocab=101)
SIXTEEN = TransformerShape(2, 64, 16, 16, 8, mlp_hidden=40, vocab=53, experts=8, top_k=1)


def cases() -> list[Case]:
    out = []
    models = {"dense": DENSE, "gqa": GQA, "moe": MOE, "moe_top2": MOE_2}
    for residual, grids in (("sharded", ((1, 1), (1, 2), (2, 1), (2, 2))), ("replicated", ((2, 2),))):
        plain = AttentionOptions(residual=residual)
        for m, n in grids:
            out += [Case(name, shape, m, n, plain) for name, shape in models.items()]
        out += [
            Case("concat", DENSE, 2, 2, replace(plain, aggregate="concat")),
            Case("concat_flat", DENSE, 2, 2, replace(plain, aggregate="concat", concat="flat")),
            Case("uneven", NINE, 3, 3, plain),
        ]
    default = AttentionOptions()
    for m, n in ((2, 1), (2, 2)):
        out += [
            Case("no_rope", NO_ROPE, m, n),
            Case("block", DENSE, m, n, replace(default, projection="block")),
            Case("perslice", DENSE, m, n, replace(default, schedule="perslice")),
        ]
    # Two ranks share one set of experts, two experts on each; and eight of sixteen, one on each.
    return [*out, Case("moe_ep2", MOE_2, 2, 2, ep_size=2), Case("replicas", SIXTEEN, 4, 4)]


CASES = {case.id: case for case in cases()}


@dataclass
class Outcome:
    """What one rank found; errors are relative (Frobenius norm)."""

    logits: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    weights_equal: dict[str, bool] = field(default_factory=dict)
    to_wide_heads: float = 0.0
    ep_size: int = 1
    replicas: int = 1
    # Of each MoE layer: rows that this rank routed, by expert; and the reference's, of all tokens.
    routed: list[list[int]] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)


def norm_weight(name: str, width: int) -> Tensor:
    """Not ones: those would hide a weight that is used in the wrong place."""
    weight = torch.empty(width)
    fill_normal(weight, 0.2, SEED, name)
    return weight + 1


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; of two zeros (an expert without tokens) 0."""
    size = expected.norm().item()
    return (found - expected).norm().item() / (size or 1.0)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """tokens[B, T] and the gradient[N, V] of the logits."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, case.shape.vocab, (case.batch, case.length), generator=generator)
    return tokens, torch.randn(case.tokens, case.shape.vocab, generator=generator).to(dtype)


def make_reference(case: Case, dtype: torch.dtype, narrow: bool) -> Reference:
    reference = Reference(case.shape, case.grid, case.options, narrow, dtype)
    reference.init_weights(SEED)
    for name, weight in reference.named_weights().items():
        if name.endswith("norm.weight"):
            fill(weight, norm_weight(name.removesuffix(".weight"), case.shape.width))
    return reference


def run_reference(case: Case, dtype: torch.dtype) -> tuple[Reference, Tensor]:
    reference = make_reference(case, dtype, narrow=case.options.schedule == "perslice")
    tokens, gradient = inputs(case, dtype)
    logits = reference(tokens)
    logits.backward(gradient)
    return reference, logits.detach()


def whole_parameters(model: Transformer, gradients: bool) -> dict[str, Tensor]:
    """Every parameter, or its gradient, whole and by the reference's names. A collective."""
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.grad if gradients else parameter
        full = torch.zeros(parameter.shape, dtype=parameter.dtype) if value is None else whole(value).detach()
        name = name.replace(".moe.deepspeed_moe.gate.wg.parametrizations.weight.original", ".router")
        if ".deepspeed_experts." not in name:
            out[name] = full
            continue
        # [ep_size, ..] of the offset-th local expert of every rank: expert rank * (experts / ep_size) + offset.
        layer, rest = name.split(".moe.deepspeed_moe.experts.deepspeed_experts.")
        offset, key = rest.split(".")
        local = model.shape.experts // model.ep_size
        for rank, one in enumerate(full):
            out[f"{layer}.experts.{rank * local + int(offset)}.{key}"] = one
    return out


def run_case(case: Case, dtype: torch.dtype) -> Outcome:
    mesh = Mesh(case.grid)
    model = Transformer(case.shape, mesh, case.options, case.ep_size, dtype)
    model.init_weights(SEED)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            fill(parameter, norm_weight(name.removesuffix(".weight"), case.shape.width))
    tokens, gradient = inputs(case, dtype)
    reference, expected = run_reference(case, dtype)

    logits = model(tokens)
    own = shard_range(case.shape.vocab, case.grid.ranks, mesh.model.rank)
    logits.backward(gradient[:, own.start : own.stop])

    out = Outcome(logits=relative(model.whole_logits(logits.detach()), expected), ep_size=model.ep_size)
    named = reference.named_weights()
    gradients = whole_parameters(model, gradients=True)
    weights = whole_parameters(model, gradients=False) if dtype == DTYPES[case.dtypes[-1]] else {}
    for name in gradients:
        if weights:
            out.weights_equal[name] = torch.equal(weights[name], named[name].detach())
        expected_gradient = named[name].grad
        # A reference's expert without tokens has a gradient of zeros as well.
        assert expected_gradient is not None
        out.gradients[name] = relative(gradients[name], expected_gradient)
    assert set(named) == set(out.gradients)
    if case.options.schedule == "perslice":
        with torch.no_grad():
            out.to_wide_heads = relative(expected, make_reference(case, dtype, narrow=False)(tokens))
    if case.shape.experts:
        out.replicas = mesh.experts(model.ep_size).size(0)
        out.routed = [block.mlp.moe.deepspeed_moe.exp_counts.tolist() for block in model.blocks]
        out.expected = [route.flatten().bincount(minlength=case.shape.experts).tolist() for route in reference.routes]
    return out


def run_cases(ids: list[str]) -> dict[tuple[str, str], Outcome]:
    out = {}
    for key in ids:
        for name in CASES[key].dtypes:
            try:
                out[key, name] = run_case(CASES[key], DTYPES[name])
            except Exception as error:
                error.add_note(f"in case {key}, {name}")
                raise
    return out


@cache
def outcomes(ranks: int) -> list[dict[tuple[str, str], Outcome]]:
    """Of every rank, for all cases of this many ranks."""
    load_deepspeed("cpu")  # once, before the fork, not on every rank
    gc.freeze()  # as in conftest.py
    ids = [key for key, case in CASES.items() if case.grid.ranks == ranks]
    return on_ranks(ranks, run_cases, ids, timeout_s=60)


def of_case(key: str, dtype: str) -> list[Outcome]:
    return [rank[key, dtype] for rank in outcomes(CASES[key].grid.ranks)]


def bound(key: str, dtype: str) -> float:
    return (ROUTED_BOUND if CASES[key].shape.experts else BOUND)[dtype]


@pytest.mark.parametrize(("key", "dtype"), [(key, dtype) for key, case in CASES.items() for dtype in case.dtypes])
def test_equals_the_reference(key: str, dtype: str) -> None:
    for outcome in of_case(key, dtype):
        assert outcome.logits <= bound(key, dtype)
        wrong = {name: error for name, error in outcome.gradients.items() if error > bound(key, dtype)}
        assert not wrong


@pytest.mark.parametrize("key", CASES)
def test_weights_are_the_same_on_every_grid(key: str) -> None:
    """Bit for bit those of the reference, which knows no ranks (but for the sizes with `projection=block`)."""
    equal = of_case(key, CASES[key].dtypes[-1])[0].weights_equal
    assert equal
    assert all(equal.values()), [name for name, same in equal.items() if not same]


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case.options.schedule == "perslice"])
def test_perslice_is_far_from_wide_heads(key: str) -> None:
    """The whole model's logits: residual paths dilute the attention's own distance of 0.7 to 0.9."""
    assert of_case(key, "fp64")[0].to_wide_heads > 0.1


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case.shape.experts])
def test_each_token_is_routed_once(key: str) -> None:
    case, ranks = CASES[key], of_case(key, "fp64")
    padded = -case.tokens % case.grid.ranks * case.shape.top_k
    for layer, expected in enumerate(ranks[0].expected):
        routed = [sum(counts) for counts in zip(*(rank.routed[layer] for rank in ranks), strict=True)]
        assert sum(routed) == case.tokens * case.shape.top_k + padded
        # Expert by expert as in the reference; rows of padding go to some.
        assert all(0 <= count - least <= padded for count, least in zip(routed, expected, strict=True))


def test_eight_experts_on_sixteen_ranks_have_two_replicas() -> None:
    for outcome in of_case("4x4-sharded-replicas", "fp64"):
        assert (outcome.ep_size, outcome.replicas) == (8, 2)


def run_qk_norm(m: int, n: int) -> float:
    """The largest error of a QK-norm weight's gradient, against the plain model's."""
    case = Case("qk_norm", GQA, m, n)
    tokens, gradient = inputs(case, torch.float64)
    plain = PlainTransformer(case.shape, torch.float64)
    plain.init_weights(SEED)
    plain(tokens).flatten(0, 1).backward(gradient)
    mesh = Mesh(case.grid)
    model = Transformer(case.shape, mesh, case.options, dtype=torch.float64)
    model.init_weights(SEED)
    own = shard_range(case.shape.vocab, case.grid.ranks, mesh.model.rank)
    model(tokens).backward(gradient[:, own.start : own.stop])
    found = whole_parameters(model, gradients=True)
    expected = dict(plain.named_parameters())
    errors = []
    for layer in range(case.shape.layers):
        for key in ("q_norm", "k_norm"):
            name = f"blocks.{layer}.attention.{key}"
            grad = expected[f"{name}.weight"].grad
            assert grad is not None
            errors.append(relative(found[name].flatten(), grad))
    return max(errors)


@pytest.mark.parametrize(("m", "n"), [(2, 1), (2, 2)])
def test_qk_norm_gradients(m: int, n: int) -> None:
    assert max(on_ranks(m * n, run_qk_norm, m, n)) <= BOUND["fp64"]
