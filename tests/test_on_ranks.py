"""`helix.verify`: what a user asks to see that the partition is exact, and its bytes as predicted."""

from __future__ import annotations

import pytest
import torch

import helix
from helix import Grid, PartitionError
from helix.attention.oracle import attention_oracle
from helix.partition.schedules import EXACT
from helix.study import verify as module

# Sums of some hundred terms in another order: a few roundings of 1.1e-16.
ROUNDING = 1e-14


def test_exact_schedules_are_the_h_heads_and_perslice_the_narrow_ones() -> None:
    found = {one.schedule: one for one in helix.verify(Grid(m=2, n=2), heads=4, head_dim=8, length=16)}
    assert set(found) == {*EXACT, "perslice"}
    for name in EXACT:
        assert found[name].error < ROUNDING
        assert found[name].narrow_error > 0.1
    assert found["perslice"].error > 0.1
    assert found["perslice"].narrow_error < ROUNDING


def test_every_rank_sends_what_the_closed_forms_say() -> None:
    """Three samples and seven rows, which two ranks are dealt unevenly; QK-norm and RoPE move things too."""
    grid = Grid(m=2, n=2)
    found = helix.verify(grid, 4, 2, 8, batch=3, length=7, rope=True, qk_norm=True, dtype=torch.float32)
    for one in found:
        assert len(one.sent) == grid.ranks
        assert one.sent == one.predicted
    batch = next(one for one in found if one.schedule == "batch")
    assert batch.sent[0] != batch.sent[1]
    assert "all_reduce/attention.qk_norm" in batch.sent[0]


def test_given_weights_have_the_oracle_s_answer_on_ranks() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"wq": (2, 1, 6, 10), "wk": (2, 1, 6, 10), "wv": (2, 1, 6, 10), "wo": (10, 2, 1, 6)}
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for name, shape in shapes.items()
    }
    x = torch.randn(1, 5, 10, generator=generator, dtype=torch.float64)
    (one,) = module.attend_on_ranks(Grid(m=3, n=1), x, weights, schedules=["auto"], causal=False)
    assert one.schedule in EXACT
    assert (one.output - attention_oracle(x, **weights, causal=False)).abs().max() < ROUNDING


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"grid": Grid(m=2, n=3)}, "n=3 does not divide heads=4"),
        ({"schedules": ["hades"]}, "there is no schedule 'hades'; legal: auto, perslice"),
        ({"schedules": ["batch"], "batch": 1}, "it deals samples to m=2 ranks, and the batch has 1"),
        ({"length": 0}, "batch and length must be at least 1, not 2 and 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_launched(
    asked: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "launch", None)
    arguments: dict[str, object] = {"grid": Grid(m=2, n=2), "heads": 4, "head_dim": 8} | asked
    with pytest.raises(PartitionError, match=sentence):
        helix.verify(**arguments)  # type: ignore[arg-type]


def test_weights_of_another_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch", None)
    x, weight = torch.zeros(1, 4, 8), torch.zeros(2, 1, 4, 8)
    with pytest.raises(PartitionError, match="wo is not among them"):
        module.attend_on_ranks(Grid(2, 1), x, {"wq": weight, "wk": weight, "wv": weight})
    weights = {"wq": weight, "wk": weight, "wv": weight, "wo": torch.zeros(8, 2, 1, 4)}
    with pytest.raises(PartitionError, match="rope=True takes weights of 2 parts a head"):
        module.attend_on_ranks(Grid(2, 1), x, weights, rope=True)
