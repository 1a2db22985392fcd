"""Each collective, forward and backward, against the same sum written out on one rank's knowledge of all.

Every rank draws every rank's tensor, so it can compute what it should receive. The numbers are small integers,
which all dtypes here hold and add exactly: every comparison is for equality.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from helix import Grid, PartitionError
from helix.comm import collectives, transport
from helix.comm import record as recording
from helix.comm.mesh import SINGLE, Axis, Mesh
from helix.comm.record import record
from helix.comm.stream import make_stream
from helix.partition import wire

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, COLUMNS = 12, 3  # 2, 3 and 4 ranks divide the rows

# What rank r holds after the forward, given everyone's x (stacked); and after the backward, given everyone's
# gradient. Those for replicated work get the same gradient on every rank.
Expected = Callable[[Tensor, int], Tensor]


def own(whole: Tensor, r: int, p: int) -> Tensor:
    return whole.chunk(p)[r]


def integers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """In [-4, 4]: sums of four stay exact in bfloat16's 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


PAIRS: dict[str, tuple[bool, Expected, Expected]] = {
    # name: (replicated work, forward, backward); x and g are [p, ..]
    "all_gather": (False, lambda x, r: x.flatten(0, 1), lambda g, r: own(g.sum(0), r, len(g))),
    "reduce_scatter": (False, lambda x, r: own(x.sum(0), r, len(x)), lambda g, r: g.flatten(0, 1)),
    "all_reduce": (False, lambda x, r: x.sum(0), lambda g, r: g.sum(0)),
    "replicate": (False, lambda x, r: x[r], lambda g, r: g.sum(0)),
    "reduce": (True, lambda x, r: x.sum(0), lambda g, r: g[r]),
    "gather": (True, lambda x, r: x.flatten(0, 1), lambda g, r: own(g[r], r, len(g))),
    "split": (False, lambda x, r: own(x[r], r, len(x)), lambda g, r: g.flatten(0, 1)),
}

# "collective" -> bytes, of the forward and of the backward of each function on x[ROWS, COLUMNS].
NUMEL = ROWS * COLUMNS
MOVED: dict[str, tuple[str | None, str | None]] = {
    "all_gather": ("all_gather", "reduce_scatter"),
    "reduce_scatter": ("reduce_scatter", "all_gather"),
    "all_reduce": ("all_reduce", "all_reduce"),
    "replicate": (None, "all_reduce"),
    "reduce": ("all_reduce", None),
    "gather": ("all_gather", None),
    "split": (None, "all_gather"),
}


def slice_axis() -> Axis:
    return Mesh(Grid(dist.get_world_size(), 1)).slice


def check_pairs(dtypes: list[torch.dtype]) -> int:
    axis, checked = slice_axis(), 0
    for dtype in dtypes:
        for name in PAIRS:
            check_pair(name, axis, dtype)
            checked += 1
    return checked


def check_pair(name: str, axis: Axis, dtype: torch.dtype) -> None:
    replicated_work, forward, backward = PAIRS[name]
    p, r = axis.size, axis.rank
    xs = integers(p, ROWS, COLUMNS, seed=1, dtype=dtype)
    x = xs[r].clone().requires_grad_()
    with record() as log:
        y = getattr(collectives, name)(x, axis, "test")
    torch.testing.assert_close(y.detach(), forward(xs, r), rtol=0, atol=0, msg=f"{name} {dtype} forward")
    gs = integers(p, *y.shape, seed=2, dtype=dtype)
    if replicated_work:
        gs = gs[:1].expand_as(gs).clone()
    g = gs[r].clone()
    with record() as back:
        y.backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, backward(gs, r), rtol=0, atol=0, msg=f"{name} {dtype} backward")
    assert torch.equal(x.detach(), xs[r]), f"{name} changed its argument"
    assert torch.equal(g, gs[r]), f"{name}'s backward changed the gradient it was given"
    for got, collective, key, numel in zip(
        (log, back), MOVED[name], ("test", "test.grad"), (x.numel(), y.numel()), strict=True
    ):
        formula = {"all_gather": wire.all_gather, "reduce_scatter": wire.reduce_scatter, "all_reduce": wire.all_reduce}
        expected = {f"{collective}/{key}": formula[collective](numel, p, dtype.itemsize)} if collective else {}
        assert dict(got.bytes) == expected, name
        assert dict(got.calls) == dict.fromkeys(expected, 1)
        assert all(seconds > 0 for seconds in got.seconds.values())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_function_equals_its_definition_forward_and_backward(ranks: int) -> None:
    assert on_ranks(ranks, check_pairs, DTYPES) == [len(DTYPES) * len(PAIRS)] * ranks


def check_all_to_all(dtypes: list[torch.dtype]) -> None:
    axis = slice_axis()
    p, r = axis.size, axis.rank
    # Rank a sends counts[a][b] rows to rank b: uneven, with an empty share, and nothing at all to rank 0.
    counts = [[(a + 2 * b) % 4 if b else 0 for b in range(p)] for a in range(p)]
    send, receive = counts[r], [counts[a][r] for a in range(p)]
    for dtype in dtypes:
        xs = [integers(sum(counts[a]), 2, 3, seed=a, dtype=dtype) for a in range(p)]
        x = xs[r].clone().requires_grad_()
        with record() as log:
            y = collectives.all_to_all(x, axis, send, receive, "test")
        expected = torch.cat([xs[a].split(counts[a])[r] for a in range(p)])
        assert torch.equal(y.detach(), expected)
        gs = [integers(sum(row[b] for row in counts), 2, 3, seed=9 + b, dtype=dtype) for b in range(p)]
        with record() as back:
            y.backward(gs[r])
        returned = torch.cat([gs[b].split([row[b] for row in counts])[r] for b in range(p)])
        assert x.grad is not None
        assert torch.equal(x.grad, returned)
        assert torch.equal(x.detach(), xs[r])
        row = 6 * dtype.itemsize
        assert dict(log.bytes) == {"all_to_all/test": (sum(send) - send[r]) * row}
        assert dict(back.bytes) == {"all_to_all/test.grad": (sum(receive) - receive[r]) * row}


@pytest.mark.parametrize("ranks", [2, 4])
def test_uneven_all_to_all_goes_there_and_back(ranks: int) -> None:
    on_ranks(ranks, check_all_to_all, DTYPES)


def check_all_to_all_of_strided() -> None:
    axis = slice_axis()
    x = torch.arange(12.0).view(3, 4).t() * (axis.rank + 1)
    assert not x.is_contiguous()
    y = collectives.all_to_all(x, axis, [2, 2], [2, 2], "test")
    kept = torch.arange(12.0).view(3, 4).t().chunk(2)[axis.rank]
    assert torch.equal(y, torch.cat([kept, 2 * kept]))
    assert torch.equal(collectives.all_gather(x, axis, "test")[:4] * (axis.rank + 1), x)


def test_a_strided_tensor_moves_as_its_values() -> None:
    on_ranks(2, check_all_to_all_of_strided)


def check_bitwise() -> list[bytes]:
    """all_reduce of numbers whose sum depends on the order of adding; 7 elements, which 2 to 4 don't divide."""
    axis = slice_axis()
    x = torch.randn(7, generator=torch.Generator().manual_seed(axis.rank)) * 10.0**axis.rank
    whole = torch.stack(
        [torch.randn(7, generator=torch.Generator().manual_seed(r)) * 10.0**r for r in range(axis.size)]
    )
    with record() as log:
        y = collectives.all_reduce(x, axis, "test")
    assert y.shape == x.shape
    torch.testing.assert_close(y, whole.sum(0))
    assert dict(log.bytes) == {"all_reduce/test": wire.all_reduce(7, axis.size, 4)}
    return [y.numpy().tobytes()]


@pytest.mark.parametrize("ranks", [3, 4])
def test_all_reduce_is_equal_on_every_rank_to_the_last_bit(ranks: int) -> None:
    results = on_ranks(ranks, check_bitwise)
    assert results == [results[0]] * ranks


def test_an_axis_of_one_rank_returns_its_input_and_moves_nothing() -> None:
    x = torch.ones(4, 2)
    with record() as log:
        for name in PAIRS:
            assert getattr(collectives, name)(x, SINGLE, "test") is x
        assert collectives.all_to_all(x, SINGLE, [4], [4], "test") is x
    assert dict(log.bytes) == {}


def check_listeners() -> None:
    axis = slice_axis()
    x = torch.ones(4)
    transport.all_reduce(x, axis, "unheard")
    assert recording._listeners == []
    with record() as outer:
        transport.all_reduce(x, axis, "a")
        with record() as inner:
            transport.all_reduce(x, axis, "a")
            transport.all_gather(x, axis, "b")
        transport.all_gather(x, axis, "c")
    transport.all_reduce(x, axis, "unheard")
    assert dict(outer.calls) == {"all_reduce/a": 2, "all_gather/b": 1, "all_gather/c": 1}
    assert dict(inner.calls) == {"all_reduce/a": 1, "all_gather/b": 1}
    assert outer.bytes["all_reduce/a"] == 2 * inner.bytes["all_reduce/a"] == 2 * wire.all_reduce(4, 2, 4)
    assert [span.key for span in outer.spans] == ["all_reduce/a", "all_reduce/a", "all_gather/b", "all_gather/c"]
    assert outer.spans[1:3] == inner.spans
    for earlier, later in zip(outer.spans, outer.spans[1:], strict=False):
        assert earlier.ranks == (0, 1)
        assert earlier.start_s == earlier.blocked_s < earlier.end_s <= later.start_s
    assert inner.seconds == {span.key: span.end_s - span.start_s for span in inner.spans}
    with pytest.raises(KeyError), record():
        raise KeyError
    assert recording._listeners == []


def test_listeners_nest_and_leave() -> None:
    on_ranks(2, check_listeners)


def check_groups() -> list[tuple[int, ...]]:
    mesh = Mesh(Grid(m=2, n=2))
    with record() as log:
        for axis in (mesh.head, mesh.slice, mesh.model):
            transport.all_reduce(torch.ones(1), axis, axis.name)
    return [span.ranks for span in log.spans]


def test_a_span_names_the_ranks_of_its_group() -> None:
    for rank, spans in enumerate(on_ranks(4, check_groups)):
        assert spans == [(rank % 2, 2 + rank % 2), (rank // 2 * 2, rank // 2 * 2 + 1), (0, 1, 2, 3)]


def check_axes() -> tuple[tuple[int, ...], list[float]]:
    """On 2 x 1 x 2 x 2 each axis sums over the ranks that differ along it only."""
    mesh = Mesh(Grid(m=2, n=2), data=2)
    mine = torch.tensor([10.0 ** dist.get_rank()], dtype=torch.float64)
    axes = (mesh.data, mesh.head, mesh.slice, mesh.model)
    sums = [collectives.all_reduce(mine, axis, "test").item() for axis in axes]
    return tuple(axis.rank for axis in axes), sums


def test_the_mesh_orders_data_then_head_then_slice() -> None:
    for rank, (coordinates, sums) in enumerate(on_ranks(8, check_axes)):
        data, head, feature = rank // 4, rank // 2 % 2, rank % 2
        assert coordinates == (data, head, feature, 2 * head + feature)
        base = 4 * data
        assert sums == [
            10.0 ** (rank % 4) + 10.0 ** (rank % 4 + 4),
            10.0 ** (base + feature) + 10.0 ** (base + 2 + feature),
            10.0 ** (base + 2 * head) + 10.0 ** (base + 2 * head + 1),
            1111.0 * 10**base,
        ]


def check_wrong_mesh() -> None:
    with pytest.raises(PartitionError, match="data=1 x stage=1 x m=2 x n=2 needs 4 ranks, not the 2 that are running"):
        Mesh(Grid(2, 2))


def test_a_mesh_that_does_not_match_the_ranks_is_refused() -> None:
    on_ranks(2, check_wrong_mesh)


def check_streams(tokens: int) -> None:
    """Entering, leaving with partial sums and finishing are the same function in both layouts."""
    axis = slice_axis()
    p, r = axis.size, axis.rank
    xs = integers(tokens, 3, seed=1, dtype=torch.float64)
    parts = integers(p, tokens, 3, seed=2, dtype=torch.float64)
    for kind in ("replicated", "sharded"):
        stream = make_stream(kind, axis)
        x = stream.leave_whole(xs, "in")
        assert x.shape[0] == (tokens if kind == "replicated" else -(-tokens // p))
        assert torch.equal(stream.enter(x, tokens, "block"), xs)
        assert torch.equal(stream.finish(stream.leave(parts[r], "block"), tokens, "out"), parts.sum(0))


@pytest.mark.parametrize("tokens", [8, 7, 3])
def test_both_residual_streams_carry_every_token(tokens: int) -> None:
    on_ranks(4, check_streams, tokens)
