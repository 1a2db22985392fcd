"""Whole weights on ranks: the oracle's answer, and the bytes of the closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helix import Grid, PartitionError
from helix.attention import on_ranks
from helix.attention.on_ranks import attend_on_ranks
from helix.attention.oracle import attention_oracle
from helix.partition.schedules import EXACT, INEXACT

# Sums of some hundred terms in another order: a few roundings of 1.1e-16.
ROUNDING = 1e-14


def drawn(
    heads: int, kv_heads: int, parts: int, run: int, batch: int, length: int
) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    width = heads * parts * run
    shapes = {
        "wq": (heads, parts, run, width),
        "wk": (kv_heads, parts, run, width),
        "wv": (kv_heads, parts, run, width),
        "wo": (width, heads, parts, run),
    }
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    return x, {name: weight * width**-0.5 for name, weight in weights.items()}


def test_every_schedule_is_its_function_and_sends_what_the_closed_forms_say() -> None:
    """Three samples and seven rows, which two ranks are dealt unevenly; grouped queries and RoPE."""
    x, weights = drawn(8, 4, 2, 4, batch=3, length=7)
    found = attend_on_ranks(Grid(m=2, n=2), x, weights, rope=True)
    assert set(found) == {*EXACT, *INEXACT}
    whole, narrow = (attention_oracle(x, **weights, rope=True, slices=slices) for slices in (1, 2))
    assert (whole - narrow).abs().max() > 0.1
    for name, one in found.items():
        assert (one.output - (whole if name in EXACT else narrow)).abs().max() < ROUNDING
        assert len(one.sent) == 4
        assert one.sent == one.predicted
    assert found["batch"].sent[0] != found["batch"].sent[1]


def test_one_rank_sends_nothing() -> None:
    x, weights = drawn(2, 2, 1, 3, batch=1, length=4)
    found = attend_on_ranks(Grid(m=1, n=1), x, weights, ["batch"], causal=False)["batch"]
    assert found.sent == found.predicted == [{}]
    assert (found.output - attention_oracle(x, **weights, causal=False)).abs().max() < ROUNDING


@pytest.mark.parametrize(
    ("grid", "schedule", "sentence"),
    [
        (Grid(m=2, n=3), "rows", "n=3 does not divide heads=2"),
        (Grid(m=2, n=2), "hades", "there is no schedule 'hades'; legal: auto, perslice"),
        (Grid(m=2, n=1), "batch", "it deals samples to m=2 ranks, and the batch has 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_launched(
    grid: Grid, schedule: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ranks, "launch", None)
    x, weights = drawn(2, 2, 1, 4, batch=1, length=4)
    with pytest.raises(PartitionError, match=sentence):
        attend_on_ranks(grid, x, weights, [schedule])
