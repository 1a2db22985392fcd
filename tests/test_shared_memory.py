"""Small exchanges through shared memory: what they move, when gloo moves it instead, and how they end."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from helix import Grid
from helix.comm import shared_memory, transport
from helix.comm.mesh import Axis, Mesh
from helix.comm.shared_memory import SLOT_BYTES, slots_for
from helix.ranks.launch import RankError

pytestmark = pytest.mark.skipif(not shared_memory._kernel(), reason="needs Linux on x86-64")


def drawn(shape: tuple[int, ...], seed: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def everyone(axis: Axis, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [drawn(shape, seed, rank, dtype) for rank in range(axis.size)]


COLLECTIVES: dict[str, Callable[[list[Tensor], int], Tensor]] = {
    "all_gather": lambda xs, r: torch.cat(xs),
    "all_reduce": lambda xs, r: torch.stack(xs).sum(0),
    "reduce_scatter": lambda xs, r: torch.stack(xs).sum(0).chunk(len(xs))[r],
    "all_to_all_even": lambda xs, r: torch.cat([x.chunk(len(xs))[r] for x in xs]),
}


def check_all(axis: Axis, rounds: int, columns: int) -> None:
    """Every collective, in turn, with numbers that every dtype adds exactly."""
    for seed in range(rounds):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            xs = everyone(axis, (axis.size, columns), seed, dtype)
            for name, expected in COLLECTIVES.items():
                got = getattr(transport, name)(xs[axis.rank], axis, "test")
                torch.testing.assert_close(got, expected(xs, axis.rank), rtol=0, atol=0, msg=f"{name} {dtype} {seed}")


def moved_here(axis: Axis) -> bool:
    """Whether shared memory takes a small tensor of this axis."""
    return slots_for(torch.ones(1), axis) is not None


def on_two_axes() -> tuple[bool, bool]:
    """Two groups of each rank, in turn, one of which is soon ahead of the other."""
    mesh = Mesh(Grid(2, 2))
    check_all(mesh.slice, 3, 5)
    for _ in range(5):
        check_all(mesh.head, 1, 3)
        check_all(mesh.model, 1, 1)
    check_all(mesh.slice, 2, 5)
    return moved_here(mesh.slice), moved_here(mesh.model)


def test_every_collective_on_several_groups() -> None:
    assert on_ranks(4, on_two_axes) == [(True, True)] * 4


def results_do_not_change() -> None:
    """What an exchange returned stays when the slots are written again, and its argument is not changed."""
    axis = Mesh(Grid(3, 1)).slice
    x = torch.arange(12.0).view(3, 4).t().contiguous().t() * (axis.rank + 1)  # not contiguous
    before = x.clone()
    kept = {name: getattr(transport, name)(x, axis, "test") for name in COLLECTIVES}
    copies = {name: y.clone() for name, y in kept.items()}
    for _ in range(4):
        check_all(axis, 1, 7)
    assert torch.equal(x, before)
    assert all(torch.equal(kept[name], copies[name]) for name in kept)


def test_results_are_tensors_of_their_own() -> None:
    on_ranks(3, results_do_not_change)


def at_the_limit() -> list[bool]:
    axis = Mesh(Grid(2, 1)).slice
    most = SLOT_BYTES // 4
    for numel in (most - 2, most, most + 2, 0):
        x = torch.full((numel,), axis.rank + 1.0)
        assert torch.equal(transport.all_reduce(x, axis, "test"), torch.full((numel,), 3.0))
    return [slots_for(torch.empty(numel), axis) is not None for numel in (most, most + 1, 0)]


def test_what_is_larger_than_a_slot_goes_over_gloo() -> None:
    assert on_ranks(2, at_the_limit) == [[True, False, False]] * 2


def fail(name: str) -> int:
    raise OSError(24, "Too many open files")


def without(how: str) -> bool:
    axis = Mesh(Grid(2, 1)).slice
    if how == "switched off":
        os.environ["HELIX_SHARED_MEMORY"] = "0"
    elif how == "another host" and axis.rank == 1:
        shared_memory._kernel = lambda: "elsewhere"
    elif how == "hidden" and axis.rank == 1:
        shared_memory._open = lambda path, size: None
    elif how == "no descriptors" and axis.rank == 0:
        os.memfd_create = fail
    elif how == "other backend":
        axis = replace(axis, exchanges=False)
    check_all(axis, 1, 4)
    return moved_here(axis)


@pytest.mark.parametrize("how", ["switched off", "another host", "hidden", "no descriptors", "other backend"])
def test_gloo_does_it_where_memory_is_not_shared(how: str) -> None:
    assert on_ranks(2, without, how) == [False, False]


@pytest.mark.parametrize("absent", [2, 0])
def test_a_rank_that_does_not_come_is_named(absent: int) -> None:
    with pytest.raises(RuntimeError, match="exchange 2 within") as caught:
        on_ranks(3, raising, absent, timeout_s=2)
    assert str(caught.value).startswith(f"rank {absent} of")


def raising(absent: int) -> None:
    axis = Mesh(Grid(3, 1)).slice
    transport.all_reduce(torch.ones(1), axis, "test")
    if axis.rank == absent:
        time.sleep(20)
    transport.all_reduce(torch.ones(1), axis, "test")


def dying() -> None:
    axis = Mesh(Grid(3, 1)).slice
    for count in range(1000):
        if count == 20 and axis.rank == 1:
            os.kill(os.getpid(), 9)
        transport.all_reduce(torch.ones(1), axis, "test")
    dist.barrier()


def test_a_killed_rank_ends_the_launch_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 \(host .*\) was killed"):
        on_ranks(3, dying, timeout_s=60)
    assert time.monotonic() - began < 15


def disagreeing(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    axis = Mesh(Grid(3, 1)).slice
    transport.all_reduce(torch.ones(4), axis, "test")
    x = torch.ones(shape, dtype=dtype) if axis.rank == 1 else torch.ones(4)
    with pytest.raises(RuntimeError) as caught:
        transport.all_reduce(x, axis, "test")
    return str(caught.value)


@pytest.mark.parametrize(("shape", "dtype"), [((3,), torch.float32), ((2, 2), torch.float32), ((2,), torch.float64)])
def test_ranks_that_disagree_are_told_who(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    said = on_ranks(3, disagreeing, shape, dtype)
    assert all(each.startswith("rank 1 of the slice axis came to exchange 2 with another tensor") for each in said)
    assert f"rank 1 has {list(shape)} of {dtype}" in said[1]


def around_the_counter() -> None:
    axis = Mesh(Grid(3, 1)).slice
    transport.all_reduce(torch.ones(1), axis, "test")
    slots = slots_for(torch.ones(1), axis)
    assert slots is not None
    for limit in (2**31, 2**32):
        dist.barrier()  # all have left the exchange before
        slots._exchanges = limit - 5
        for line in range(4):
            slots._words[line * 16] = limit - 5
        dist.barrier()
        check_all(axis, 2, 3)


def test_counts_of_exchanges_begin_anew() -> None:
    on_ranks(3, around_the_counter)


def freed() -> bool:
    group = dist.new_group([0, 1])
    axis = Axis("pair", 2, dist.get_rank(), group, exchanges=True)
    transport.all_reduce(torch.ones(1), axis, "test")
    assert moved_here(axis)
    dist.destroy_process_group(group)
    seen = weakref.ref(group)
    del group, axis
    gc.collect()
    return seen() is None


def test_a_group_is_freed_with_its_memory() -> None:
    assert on_ranks(2, freed) == [True, True]


def integers_stay() -> torch.dtype:
    return transport.all_reduce(torch.ones(3, dtype=torch.int32), Mesh(Grid(2, 1)).slice, "test").dtype


def test_a_sum_of_integers_has_their_dtype() -> None:
    assert on_ranks(2, integers_stay) == [torch.int32] * 2
