"""Parity over drawn shapes: whatever the grid divides, every legal way to compute it gives the oracle's answer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity import Attention, Case, assert_parity, run_all
from ranks import on_ranks

from helix import Grid
from helix.partition.schedules import legal_schedules

CASES_PER_LAUNCH = 25  # a launch costs half a second, a case some milliseconds


@st.composite
def cases(draw: st.DrawFn, grid: Grid) -> Case:
    """Any attention that the grid divides, with any schedule and ends that are legal for it."""
    rope = draw(st.booleans())
    kv_heads = grid.n * draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = grid.m * draw(st.integers(1, 3)) * (2 if rope else 1)
    projects = draw(st.booleans())
    projection = draw(st.sampled_from(("column", "block")))
    free = projects and projection == "column"
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        causal=draw(st.booleans()),
        rope=rope,
        qk_norm=draw(st.booleans()),
        projects=projects,
        batch=draw(st.integers(1, 5)),
        length=draw(st.integers(1, 9)),
        width=draw(st.integers(1, 24)) if free else heads * head_dim,
    )
    return Case(
        attention,
        draw(st.sampled_from(["auto", *legal_schedules(attention.layout, grid, attention.batch, attention.length)])),
        concat=draw(st.sampled_from(("hierarchical", "flat"))),
        projection=projection,
        stream=draw(st.sampled_from(("replicated", "sharded"))),
    )


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 1), Grid(1, 3), Grid(3, 1), Grid(2, 2), Grid(4, 1)], ids=str)
def test_any_shape_on_any_small_grid(grid: Grid) -> None:
    # Not shrunk: each try would be a launch, and the failing cases are named anyway.
    @settings(
        max_examples=2,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],
    )
    @given(st.lists(cases(grid), min_size=CASES_PER_LAUNCH, max_size=CASES_PER_LAUNCH, unique=True))
    def parity(drawn: list[Case]) -> None:
        assert_parity(on_ranks(grid.ranks, run_all, grid, drawn), drawn)

    parity()
