"""The plain transformer against the reference, and PyTorch's tensor parallelism of it against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from helix.comm.mesh import Mesh
from helix.comm.parameters import whole
from helix.models.plain import PlainTransformer
from helix.models.reference import Reference
from helix.parallel.tensor_parallel import tensor_parallel
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.rivals import check_tensor
from helix.partition.shape import TransformerShape

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
# fp64 keeps 16 digits, fp32 7; sums in another order lose a few of them.
BOUND = {"fp64": 1e-10, "fp32": 1e-5}
SHAPE = TransformerShape(2, 32, 8, 4, 8, mlp_hidden=48, vocab=40)
VARIANTS = {"rope_causal": SHAPE, "qk_norm": replace(SHAPE, qk_norm=True, causal=False, rope=False)}
BATCH, LENGTH, SEED = 2, 8, 7


@dataclass
class Outcome:
    """Relative errors: plain against reference, parallel against plain, and the latter of every gradient."""

    to_reference: float
    logits: float
    gradients: dict[str, float]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def gradients(model: PlainTransformer) -> dict[str, Tensor]:
    out = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        out[name] = whole(parameter.grad).detach()
    return out


def run_plain(shape: TransformerShape, sequence: bool, dtype: torch.dtype) -> Outcome:
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, shape.vocab, (BATCH, LENGTH), generator=generator)
    gradient = torch.randn(BATCH, LENGTH, shape.vocab, generator=generator).to(dtype)
    reference = Reference(shape, Grid(1, 1), AttentionOptions(), dtype=dtype)
    single, parallel = PlainTransformer(shape, dtype), PlainTransformer(shape, dtype)
    for model in (reference, single, parallel):
        model.init_weights(SEED)
    logits = single(tokens)
    logits.backward(gradient)
    mesh = Mesh(Grid(1, dist.get_world_size())).device_mesh["head"]
    tensor_parallel(parallel, mesh, sequence)
    shard = parallel(tokens)
    shard.backward(gradient.chunk(mesh.size(), -1)[mesh.get_local_rank()].contiguous())
    joined = DTensor.from_local(shard.detach(), mesh, [Shard(2)], run_check=False).redistribute(
        placements=[Replicate()]
    )
    with torch.no_grad():
        to_reference = relative(logits.flatten(0, 1), reference(tokens))
    expected, found = gradients(single), gradients(parallel)
    return Outcome(
        to_reference,
        relative(joined.to_local(), logits.detach()),
        {name: relative(found[name], expected[name]) for name in expected},
    )


def run_variants(sequence: bool) -> dict[tuple[str, str], Outcome]:
    return {
        (variant, dtype): run_plain(shape, sequence, DTYPES[dtype])
        for variant, shape in VARIANTS.items()
        for dtype in DTYPES
    }


@pytest.mark.parametrize(("ranks", "sequence"), [(1, False), (2, False), (4, False), (4, True)])
def test_equals_the_reference_on_any_number_of_ranks(ranks: int, sequence: bool) -> None:
    for outcomes in on_ranks(ranks, run_variants, sequence):
        for (variant, dtype), outcome in outcomes.items():
            errors = {"reference": outcome.to_reference, "logits": outcome.logits, **outcome.gradients}
            assert not {name: error for name, error in errors.items() if not error <= BOUND[dtype]}, (variant, dtype)


def test_tensor_parallelism_has_no_answer_to_few_kv_heads() -> None:
    """Where Helix has one: m."""
    with pytest.raises(PartitionError, match="kv_heads is 1"):
        check_tensor(replace(SHAPE, kv_heads=1), 2)


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_equal_the_reference(top_k: int) -> None:
    shape = replace(SHAPE, experts=4, top_k=top_k)
    reference, plain = (
        Reference(shape, Grid(1, 1), AttentionOptions(), dtype=torch.float64),
        PlainTransformer(shape, torch.float64),
    )
    tokens = torch.randint(0, shape.vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(SEED))
    for model in (reference, plain):
        model.init_weights(SEED)
    with torch.no_grad():
        assert relative(plain(tokens).flatten(0, 1), reference(tokens)) <= BOUND["fp64"]
