"""The closed forms: the design's figures, what `auto` chooses, and the wire's convention."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix import Grid, PartitionError
from helix.partition import wire
from helix.partition.cost import AttentionCost, cheapest_schedule
from helix.partition.grid import HeadLayout
from helix.partition.schedules import EXACT, SCHEDULES, legal_schedules, refusal

# The papers' shape: 32 heads of 128, batch 128, length 10,000, on 4x4 ranks in FP16.
PAPER = HeadLayout(32, 32, 128)


def paper_cost(schedule: str, causal: bool = False, grid: Grid = Grid(4, 4)) -> AttentionCost:  # noqa: B008
    return AttentionCost(PAPER, grid, schedule, batch=128, length=10_000, causal=causal, itemsize=2)


def total(cost: AttentionCost, feature_slice: int = 0) -> int:
    return sum(cost.bytes(feature_slice).values())


@st.composite
def problems(draw: st.DrawFn) -> tuple[HeadLayout, Grid, int, int]:
    grid = Grid(draw(st.integers(1, 8)), draw(st.integers(1, 4)))
    kv_heads = grid.n * draw(st.integers(1, 8))
    layout = HeadLayout(kv_heads * draw(st.integers(1, 4)), kv_heads, grid.m * draw(st.integers(1, 32)))
    return layout, grid, draw(st.integers(1, 64)), draw(st.integers(1, 512))


def test_the_papers_shape_costs_what_the_design_says() -> None:
    # Scores are summed in fp32: 2 * 3/4 * (128 * 8 * 10,000^2) * 4 bytes.
    assert paper_cost("score").bytes() == {"all_reduce/attention.scores": 614_400_000_000}
    assert total(paper_cost("batch")) == pytest.approx(2.0e9, rel=0.02)
    assert paper_cost("batch").bytes() == {
        "all_to_all/attention.qkv": 96 * 10_000 * (3 * 8) * 32 * 2,
        "all_to_all/attention.out": 3 * 32 * 10_000 * 8 * 32 * 2,
    }
    assert total(paper_cost("heads")) == total(paper_cost("batch"))


def test_score_loses_to_batch_beyond_half_a_head_of_length() -> None:
    """DESIGN: `score` loses once S > d/2, where score and head numbers have the same width."""

    def ratio(length: int) -> float:
        score, batch = (
            total(AttentionCost(PAPER, Grid(4, 4), name, 4, length, False, itemsize=4)) for name in ("score", "batch")
        )
        return score / batch

    assert ratio(64) == pytest.approx(1)
    assert ratio(63) < 1 < ratio(65)


@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_gather_repeats_the_scores(m: int) -> None:
    gather, perslice = (paper_cost(name, grid=Grid(m, 1)).core_flops() for name in ("gather", "perslice"))
    assert gather / perslice == (1 + m) / 2


@pytest.mark.parametrize("schedule", ["batch", "heads", "rows", "score", "perslice"])
def test_the_others_divide_the_work_by_m(schedule: str) -> None:
    whole = paper_cost(schedule, grid=Grid(1, 4)).core_flops()
    # 4 FLOPs a pair and feature: a multiply-add each for Q K^T and P V.
    assert whole == 4 * 128 * 8 * 10_000**2 * 128
    assert paper_cost(schedule).core_flops() * 4 == whole


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_causal_halves_the_core_but_not_for_score(schedule: str) -> None:
    ratio = paper_cost(schedule, causal=True).core_flops() / paper_cost(schedule).core_flops()
    assert ratio == pytest.approx(1.0 if schedule == "score" else 0.5, rel=1e-3)


@given(problems(), st.sampled_from(SCHEDULES), st.booleans(), st.booleans())
def test_one_slice_moves_nothing(
    problem: tuple[HeadLayout, Grid, int, int], schedule: str, causal: bool, qk_norm: bool
) -> None:
    layout, grid, batch, length = problem
    cost = AttentionCost(layout, Grid(1, grid.n), schedule, batch, length, causal, 4)
    assert cost.bytes(qk_norm=qk_norm) == {}


@given(problems(), st.booleans())
def test_perslice_moves_nothing_on_any_grid(problem: tuple[HeadLayout, Grid, int, int], causal: bool) -> None:
    layout, grid, batch, length = problem
    assert AttentionCost(layout, grid, "perslice", batch, length, causal, 4).bytes(qk_norm=True) == {}


@pytest.mark.parametrize("schedule", EXACT)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_qk_norm_adds_one_all_reduce_of_squares(schedule: str, itemsize: int) -> None:
    cost = AttentionCost(HeadLayout(16, 4, 32), Grid(4, 1), schedule, 4, 6, True, itemsize)
    added = cost.bytes(qk_norm=True) - cost.bytes()
    # One fp32 (fp64 for fp64) sum of squares for each token and own head, queries' and keys'.
    assert added == {"all_reduce/attention.qk_norm": 2 * 3 * (4 * 6 * (16 + 4) // 4) * max(4, itemsize)}


@given(problems(), st.booleans(), st.sampled_from([2, 4, 8]))
def test_auto_is_legal_exact_and_cheapest(
    problem: tuple[HeadLayout, Grid, int, int], causal: bool, itemsize: int
) -> None:
    layout, grid, batch, length = problem
    chosen = cheapest_schedule(layout, grid, batch, length, causal, itemsize)
    assert chosen in EXACT
    assert chosen != "perslice"
    assert refusal(chosen, layout, grid, batch, length) is None
    weights = {
        name: AttentionCost(layout, grid, name, batch, length, causal, itemsize).weight()
        for name in legal_schedules(layout, grid, batch, length)
        if name in EXACT
    }
    assert weights[chosen] == min(weights.values())


@pytest.mark.parametrize(
    ("layout", "batch", "length", "chosen"),
    [
        (HeadLayout(16, 16, 64), 8, 256, "batch"),  # as cheap as "heads", with less to copy
        (HeadLayout(16, 16, 64), 1, 256, "heads"),  # 4 heads a group, dealt to 4
        (HeadLayout(4, 4, 64), 8, 256, "batch"),  # one head a group
        (HeadLayout(4, 4, 64), 1, 256, "gather"),  # and one sample, short: repeated scores beat moving V
        (HeadLayout(4, 4, 64), 1, 8192, "rows"),  # and long: they don't
        (HeadLayout(4, 4, 64), 1, 3, "score"),  # a handful of scores is less than their keys
    ],
)
def test_what_auto_chooses(layout: HeadLayout, batch: int, length: int, chosen: str) -> None:
    assert cheapest_schedule(layout, Grid(4, 4), batch, length, True, 4) == chosen


def test_auto_refuses_an_empty_batch() -> None:
    with pytest.raises(PartitionError, match="no exact schedule runs batch=0, length=8 on helix_2x2"):
        cheapest_schedule(HeadLayout(4, 4, 8), Grid(2, 2), 0, 8, True, 4)


@given(problems(), st.sampled_from(["batch", "rows", "heads"]), st.booleans())
def test_what_the_ranks_of_a_group_send_adds_up(
    problem: tuple[HeadLayout, Grid, int, int], schedule: str, causal: bool
) -> None:
    """However unevenly samples or rows are dealt, each number moves once: (m - 1) / m of each dealt tensor."""
    layout, grid, batch, length = problem
    if grid.m == 1 or refusal(schedule, layout, grid, batch, length):
        return
    cost = AttentionCost(layout, grid, schedule, batch, length, causal, 4)
    sent = [cost.bytes(j) for j in range(grid.m)]
    query = batch * length * layout.heads // grid.n * layout.head_dim
    keys_values = 2 * batch * length * layout.kv_heads // grid.n * layout.head_dim
    share = 4 * (grid.m - 1) / grid.m
    dealt = query + (0 if schedule == "rows" else keys_values)
    name = "all_to_all/attention.q" if schedule == "rows" else "all_to_all/attention.qkv"
    assert sum(one[name] for one in sent) == pytest.approx(dealt * share)
    assert sum(one["all_to_all/attention.out"] for one in sent) == pytest.approx(query * share)
    if schedule == "rows":  # every rank needs all keys and values
        assert sum(one["all_gather/attention.kv"] for one in sent) == pytest.approx(keys_values * share * grid.m)


@pytest.mark.parametrize(("p", "numel"), [(2, 8), (4, 8), (3, 9)])
def test_wire_formulas(p: int, numel: int) -> None:
    assert wire.all_gather(numel // p, p, 4) == (p - 1) * (numel // p) * 4
    assert wire.reduce_scatter(numel, p, 4) == (p - 1) * numel // p * 4
    assert wire.all_reduce(numel, p, 4) == 2 * (p - 1) * numel // p * 4
    assert wire.all_to_all(numel, numel // p, 4) == (numel - numel // p) * 4


def test_wire_rounds_shares_up_and_an_axis_of_one_moves_nothing() -> None:
    assert wire.reduce_scatter(5, 4, 2) == 3 * 2 * 2
    assert wire.all_reduce(5, 4, 2) == 2 * 3 * 2 * 2
    assert wire.all_gather(5, 1, 4) == wire.reduce_scatter(5, 1, 4) == wire.all_reduce(5, 1, 4) == 0
    assert wire.all_to_all(5, 5, 4) == 0
