"""Who owns what, which grids and schedules are legal, and what the refusals say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix import Grid, PartitionError
from helix.partition.grid import HeadLayout, divisors, legal_grids
from helix.partition.schedules import (
    EXACT,
    SCHEDULES,
    check_schedule,
    deal_sizes,
    legal_schedules,
    refusal,
    row_chunks,
)
from helix.partition.shape import (
    TransformerShape,
    check_ends,
    check_expert_parallel,
    check_routing,
    default_expert_parallel,
)

sizes = st.integers(1, 8)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Grid, HeadLayout]:
    """A grid and an attention that it divides, built up from the parts so that every draw is legal."""
    grid, rope = Grid(draw(sizes), draw(sizes)), draw(st.booleans())
    kv_heads = grid.n * draw(st.integers(1, 4))
    head_dim = grid.m * draw(sizes) * (2 if rope else 1)
    return grid, HeadLayout(kv_heads * draw(st.integers(1, 4)), kv_heads, head_dim, rope)


@given(partitions())
def test_every_feature_of_every_head_has_exactly_one_owner(partition: tuple[Grid, HeadLayout]) -> None:
    grid, layout = partition
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)
    for heads in (layout.heads, layout.kv_heads):
        owned = [
            (head, feature)
            for i, j in map(grid.coordinates, range(grid.ranks))
            for head in grid.owned_heads(heads, i)
            for feature in grid.owned_features(layout, j)
        ]
        assert sorted(owned) == [(head, feature) for head in range(heads) for feature in range(layout.head_dim)]


@given(partitions())
def test_a_group_owns_the_kv_heads_that_its_query_heads_attend_to(partition: tuple[Grid, HeadLayout]) -> None:
    grid, layout = partition
    for i in range(grid.n):
        attended = {head // layout.queries_per_kv for head in grid.owned_heads(layout.heads, i)}
        assert attended == set(grid.owned_heads(layout.kv_heads, i))


@given(partitions())
def test_rope_pairs_stay_on_one_slice_in_matching_order(partition: tuple[Grid, HeadLayout]) -> None:
    grid, layout = partition
    for j in range(grid.m):
        features = grid.owned_features(layout, j)
        assert len(features) == layout.head_dim // grid.m
        if layout.rope:
            half = len(features) // 2
            assert features[half:] == [feature + layout.head_dim // 2 for feature in features[:half]]


@given(sizes, sizes)
def test_ranks_and_coordinates_are_inverse(m: int, n: int) -> None:
    grid = Grid(m, n)
    assert [grid.rank(*grid.coordinates(rank)) for rank in range(grid.ranks)] == list(range(m * n))


def test_worked_example_of_the_docstring() -> None:
    grid = Grid(m=2, n=2)
    contiguous, paired = HeadLayout(2, 2, 8), HeadLayout(2, 2, 8, rope=True)
    table = {
        grid.coordinates(rank): (
            list(grid.owned_heads(2, grid.coordinates(rank)[0])),
            grid.owned_features(contiguous, grid.coordinates(rank)[1]),
            grid.owned_features(paired, grid.coordinates(rank)[1]),
        )
        for rank in range(4)
    }
    assert table == {
        (0, 0): ([0], [0, 1, 2, 3], [0, 1, 4, 5]),
        (0, 1): ([0], [4, 5, 6, 7], [2, 3, 6, 7]),
        (1, 0): ([1], [0, 1, 2, 3], [0, 1, 4, 5]),
        (1, 1): ([1], [4, 5, 6, 7], [2, 3, 6, 7]),
    }
    assert grid.name == "helix_2x2"


@pytest.mark.parametrize(
    ("grid", "attention", "reason", "legal"),
    [
        (Grid(4, 4), (9, 3, 64), "n=4 does not divide kv_heads=3", "(16, 1)"),
        (Grid(4, 4), (6, 6, 64), "n=4 does not divide heads=6", "(8, 2), (16, 1)"),
        (Grid(2, 2), (8, 1, 64), "n=2 does not divide kv_heads=1", "(4, 1)"),
        (Grid(3, 3), (9, 3, 64), "m=3 does not divide head_dim=64", None),
        (Grid(4, 2), (2, 2, 12, True), "m=4 does not divide head_dim/2=6 (RoPE needs slices that hold", None),
        (Grid(4, 2), (8, 8, 12, True), "m=4 does not divide head_dim/2=6", "(1, 8), (2, 4)"),
        (Grid(8, 2), (4, 4, 8, True), "m=8 does not divide head_dim/2=4", "(4, 4)"),
    ],
)
def test_an_illegal_grid_names_what_does_not_divide_and_lists_the_legal_ones(
    grid: Grid, attention: tuple[int, int, int], reason: str, legal: str | None
) -> None:
    with pytest.raises(PartitionError) as caught:
        grid.check(*attention)
    message = str(caught.value)
    assert message.startswith(f"{grid.name} cannot partition this attention: {reason}")
    expected = f"legal (m, n) on {grid.ranks} ranks: {legal}" if legal else f"no (m, n) with m*n={grid.ranks} is legal"
    assert expected in message
    assert "\n" not in message


@given(st.integers(1, 24), partitions())
def test_the_listed_grids_are_the_ones_that_pass(ranks: int, partition: tuple[Grid, HeadLayout]) -> None:
    layout = partition[1]
    legal = legal_grids(layout, ranks)
    for grid in (Grid(m, ranks // m) for m in divisors(ranks)):
        if grid in legal:
            grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)
        else:
            with pytest.raises(PartitionError, match="does not divide"):
                grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(0, 4), "m >= 1 and n >= 1, not m=0, n=4"),
        (lambda: Grid(4, -1), "not m=4, n=-1"),
        (lambda: HeadLayout(0, 1, 8), "heads must be at least 1, not 0"),
        (lambda: HeadLayout(8, 0, 8), "kv_heads must be at least 1"),
        (lambda: HeadLayout(8, 8, 0), "head_dim must be at least 1"),
        (lambda: HeadLayout(6, 4, 8), "kv_heads=4 does not divide heads=6; legal kv_heads: [1, 2, 3, 6]"),
        (lambda: HeadLayout(2, 2, 7, rope=True), "head_dim must be even, not 7"),
        (lambda: TransformerShape(0, 8, 2, 2, 4, 8), "layers must be at least 1"),
        (lambda: check_routing(TransformerShape(1, 8, 2, 2, 4, 8, experts=4, top_k=3)), "top_k must be 1 or 2"),
        (lambda: TransformerShape(1, 8, 2, 2, 4, 8, shared_hidden=4), "shared_hidden=4 is the width of an MLP beside"),
        (lambda: TransformerShape(1, 8, 2, 2, 4, 8, experts=1, top_k=2), "top_k=2 needs at least that many experts"),
        (lambda: TransformerShape(1, 8, 2, 2, 4, 8, experts=-1), "experts must be 0 (dense) or more, not -1"),
        (lambda: check_expert_parallel(8, 16, 16), "ep_size must divide both; legal ep_size: [1, 2, 4, 8]"),
        (lambda: check_expert_parallel(6, 3, 4), "legal ep_size: [1, 2]"),
        (
            lambda: check_ends(HeadLayout(2, 2, 8), 8, "concat", "column"),
            "aggregate=concat needs heads * head_dim = width, not 2 * 8 != 8",
        ),
        (
            lambda: check_ends(HeadLayout(2, 2, 8), 8, "project", "block"),
            "projection=block needs heads * head_dim = width",
        ),
    ],
)
def test_impossible_shapes_are_refused_in_a_sentence(make: object, message: str) -> None:
    with pytest.raises(PartitionError, match=re.escape(message)):
        make()  # type: ignore[operator]


def test_partition_errors_are_value_errors() -> None:
    assert issubclass(PartitionError, ValueError)


def test_eight_experts_on_sixteen_ranks_are_replicated_twice() -> None:
    assert default_expert_parallel(8, 16) == 8
    assert default_expert_parallel(6, 16) == 2
    assert default_expert_parallel(5, 16) == 1


@pytest.mark.parametrize(
    ("schedule", "layout", "batch", "length", "reason"),
    [
        ("batch", HeadLayout(4, 4, 8), 3, 9, "it deals samples to m=4 ranks, and the batch has 3"),
        ("rows", HeadLayout(4, 4, 8), 9, 3, "it deals query rows to m=4 ranks, and the sequence has 3"),
        ("heads", HeadLayout(4, 4, 8), 9, 9, "m=4 ranks, which does not divide the group's heads=2"),
        ("heads", HeadLayout(16, 4, 8), 9, 9, "m=4 ranks, which does not divide the group's kv_heads=2"),
        ("ring", HeadLayout(4, 4, 8), 9, 9, "there is no schedule 'ring'"),
    ],
)
def test_a_schedule_that_cannot_run_says_why_and_which_can(
    schedule: str, layout: HeadLayout, batch: int, length: int, reason: str
) -> None:
    grid = Grid(4, 2)
    with pytest.raises(PartitionError, match=re.escape(reason)) as caught:
        check_schedule(schedule, layout, grid, batch, length)
    message = str(caught.value)
    assert message.startswith(f"schedule={schedule} cannot run on helix_4x2: ")
    listed = message.split("legal: ")[1].split(", ")
    assert listed == ["auto", *legal_schedules(layout, grid, batch, length)]
    for name in listed:
        check_schedule(name, layout, grid, batch, length)


@given(partitions(), st.integers(1, 9), st.integers(1, 9))
def test_only_batch_rows_and_heads_are_ever_refused(
    partition: tuple[Grid, HeadLayout], batch: int, length: int
) -> None:
    grid, layout = partition
    refused = {name for name in SCHEDULES if refusal(name, layout, grid, batch, length)}
    # By the rules of DESIGN's table; n divides the heads, so m divides a group's if m n divides all of them.
    assert refused == {
        name
        for name, illegal in {
            "batch": batch < grid.m,
            "rows": length < grid.m,
            "heads": layout.kv_heads % grid.ranks != 0 or layout.heads % grid.ranks != 0,
        }.items()
        if illegal
    }
    assert {"gather", "score"} <= set(EXACT) - refused


@given(st.integers(0, 200), st.integers(1, 16))
def test_dealing_covers_everything_as_evenly_as_can_be(count: int, ranks: int) -> None:
    dealt = deal_sizes(count, ranks)
    assert len(dealt) == ranks
    assert sum(dealt) == count
    assert set(dealt) <= {count // ranks, -(-count // ranks)}


@given(st.integers(1, 200), st.integers(1, 16), st.booleans())
def test_row_chunks_cover_every_row_once(length: int, ranks: int, causal: bool) -> None:
    chunks = row_chunks(length, ranks, causal)
    assert len(chunks) == ranks
    assert sorted(row for mine in chunks for run in mine for row in run) == list(range(length))


@given(st.integers(1, 400), st.integers(1, 16))
def test_causal_rows_are_balanced_to_a_chunk(length: int, ranks: int) -> None:
    work = [sum(row + 1 for run in mine for row in run) for mine in row_chunks(length, ranks, causal=True)]
    # Chunk sizes differ by at most one row, so a rank's two chunks are off by at most a row each, of at most
    # `length` scores, and each by half a row times the rows in it.
    assert max(work) - min(work) <= 2 * length + length // ranks
    if length % (2 * ranks) == 0:
        assert len(set(work)) == 1


def test_contiguous_rows_would_not_be_balanced() -> None:
    """What the zig-zag is for: without it the last of 4 ranks has 7 times the work of the first."""
    zigzag, contiguous = (row_chunks(64, 4, causal) for causal in (True, False))
    work = [[sum(row + 1 for run in mine for row in run) for mine in chunks] for chunks in (zigzag, contiguous)]
    assert len(set(work[0])) == 1
    assert max(work[1]) > 6 * min(work[1])
