"""Processes on several hosts take the positions that the placement wants, or are refused in one sentence."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
import torch.distributed as dist
from hypothesis import assume, example, given
from hypothesis import strategies as st

from helix.config import environment
from helix.config.check import check_device
from helix.config.environment import Started, started
from helix.config.schema import ConfigError
from helix.partition.between_hosts import between_hosts
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.placement import ACROSS, AUTO, INSIDE, RANK_ORDER, check_hosts, hosts_placed, place
from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import TransformerCost
from helix.ranks.hosts import first_of_host, hosts_of, own_host
from helix.ranks.launch import _adopt_slurm
from helix.ranks.process_group import _own_cores

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}


@st.composite
def hosts(draw: st.DrawFn, most: int = 5) -> tuple[list[int], int]:
    """The host of each process in any order of the launcher's, and an m that divides their number."""
    counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=most))
    if draw(st.booleans()):
        counts = [counts[0]] * len(counts)
    names = draw(st.permutations([10 * host for host, count in enumerate(counts) for _ in range(count)]))
    m = draw(st.sampled_from([size for size in range(1, len(names) + 1) if len(names) % size == 0]))
    return list(names), m


def groups(found: list[int], m: int) -> list[list[int]]:
    """The hosts of each slice group."""
    return [found[first : first + m] for first in range(0, len(found), m)]


@given(hosts(), st.sampled_from((AUTO, INSIDE, ACROSS)))
@example(([0, 1, 0, 1], 2), INSIDE)  # SLURM's cyclic distribution
def test_every_placement_is_a_renumbering_that_keeps_what_it_says(case: tuple[list[int], int], placement: str) -> None:
    names, m = case
    counts = Counter(names)
    inside = all(count % m == 0 for count in counts.values())
    across = m > 1 and len(counts) > 1 and len(set(counts.values())) == 1 and m % len(counts) == 0
    if not {AUTO: True, INSIDE: inside, ACROSS: across}[placement]:
        with pytest.raises(
            PartitionError, match=rf"^parallel\.placement={placement} .*; legal here: parallel\.placeme"
        ):
            place(placement, names, m)
        return
    taken, positions = place(placement, names, m)
    assert sorted(positions) == list(range(len(names)))
    assert positions[0] == 0
    for host in counts:  # neighbours by LOCAL_RANK stay in their order
        own = [position for position, name in zip(positions, names, strict=True) if name == host]
        assert taken == RANK_ORDER or own == sorted(own)
    found = hosts_placed(placement, names, m)
    assert Counter(found) == counts
    if placement == ACROSS:
        assert taken == ACROSS
        for group in groups(found, m):
            assert set(Counter(group).values()) == {m // len(counts)}
        for head_group in zip(*groups(found, m), strict=True):
            assert len(set(head_group)) == 1
    elif inside:
        assert taken == INSIDE
        assert all(len(set(group)) == 1 for group in groups(found, m))
    else:
        assert taken == RANK_ORDER
        assert positions == tuple(range(len(names)))


def test_slurms_cyclic_distribution_comes_out_with_slices_inside_hosts() -> None:
    assert place(AUTO, [0, 1, 0, 1], 2) == (INSIDE, (0, 2, 1, 3))
    assert place(ACROSS, [0, 0, 1, 1], 2) == (ACROSS, (0, 2, 1, 3))


@given(hosts(most=3), st.sampled_from((INSIDE, ACROSS)))
def test_what_the_number_of_hosts_refuses_no_spread_of_the_ranks_allows(
    case: tuple[list[int], int], placement: str
) -> None:
    names, m = case
    refused = False
    try:
        check_hosts(placement, len(names), len(set(names)), m)
    except PartitionError:
        refused = True
    if refused:
        with pytest.raises(PartitionError):
            place(placement, names, m)


@pytest.mark.parametrize(
    ("placement", "names", "m", "said"),
    [
        (INSIDE, [0, 1, 1, 1], 2, "m=2 does not divide a host's 1 ranks; legal here: .*=auto, or m of 1"),
        (ACROSS, [0, 1, 1, 1], 2, "equally many ranks on every host, not 1, 3; legal here: .*=auto$"),
        (ACROSS, [0, 0, 1, 1], 1, "m=1 has none; legal here: parallel.placement=auto or slices_inside, or m of 2, 4"),
        (ACROSS, [0, 0, 0, 1, 1, 1], 3, "and 2 hosts do not divide them; .*=auto or slices_inside, or m of 2, 6"),
        (ACROSS, [0, 0], 2, "all ranks are on one; legal here: parallel.placement=auto or slices_inside$"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_legal_choices(placement: str, names: list[int], m: int, said: str) -> None:
    with pytest.raises(PartitionError, match=said):
        place(placement, names, m)


def test_hosts_are_told_apart_by_more_than_their_names() -> None:
    found = hosts_of(["box boot1 pid:[1]", "box boot1 pid:[2]", "box boot1 pid:[1]", "other boot2 pid:[1]"])
    assert found.names == ("box", "box (2)", "other")
    assert found.of == (0, 1, 0, 2)
    assert found.ranks() == {"box": [0, 2], "box (2)": [1], "other": [3]}
    assert found.where(1) == "box (2)"
    assert len(own_host().split()) == 3


@pytest.mark.parametrize("variables", [TORCHRUN, TORCHRUN | {"GROUP_WORLD_SIZE": "3"}, SLURM])
def test_launchers_say_how_many_hosts_there_are(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    here = started()
    assert here is not None
    assert here.hosts == int(variables.get("GROUP_WORLD_SIZE", "4" if variables == TORCHRUN else "2"))
    assert here.by == ("SLURM" if variables == SLURM else "torchrun")


def test_a_task_of_sruns_is_one_still_when_its_ranks_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (SLURM | {"SLURM_LOCALID": "1", "SLURM_GTIDS": "0,1,2,3,4", "MASTER_ADDR": "here"}).items():
        monkeypatch.setenv(key, value)
    for each in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(each, "")  # so that it is put back
        monkeypatch.delenv(each)
    before = started()
    assert before == Started("SLURM", 8, 1, 5, 2)
    _adopt_slurm()
    assert started() == before


def test_cores_are_shared_by_the_ranks_of_a_host_that_may_use_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores each: process 0 alone has its own, 1 and 2 share theirs, and 3 is of another host."""
    said, masks = ["a", "a", "a", "b"], [range(8), range(8, 16), range(8, 16), range(8)]
    store = dist.HashStore()
    for number, mask in enumerate(masks):
        store.set(f"cores/{number}", json.dumps(list(mask)))
    found = []
    for number, mask in enumerate(masks):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, mask=mask: set(mask))
        found.append(_own_cores(store, number, said))
    assert found == [8, 4, 4, 8]


def test_the_first_rank_of_each_host() -> None:
    said = ["a", "b", "a", "b", "c"]
    assert [number for number in range(5) if first_of_host(said, number)] == [0, 1, 4]


@pytest.mark.parametrize("variable", [{"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:1"}])
def test_a_task_that_sees_its_own_gpu_alone_is_not_left_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]
) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: 1)
    assert check_device("auto", 4) == "cpu"
    monkeypatch.setenv(*next(iter(variable.items())))
    assert check_device("auto", 4) == "cpu"  # one task, whose ranks are forked
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    assert check_device("auto", 1) == "cuda"
    assert check_device("cpu", 4) == "cpu"
    for asked in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="ask for --gpus-per-node, or choose device=cpu"):
            check_device(asked, 4)


def transformer(m: int, n: int, schedule: str, batch: int = 3, length: int = 6, **options: str) -> TransformerCost:
    shape = TransformerShape(layers=2, width=16, heads=4, kv_heads=4, head_dim=8, mlp_hidden=32, vocab=64)
    return TransformerCost(shape, Grid(m, n), AttentionOptions(schedule, **options), batch, length, 4)


@given(
    st.sampled_from([(2, 2), (4, 1), (1, 4), (4, 2)]),
    st.sampled_from(("batch", "heads", "rows", "gather", "score")),
    st.sampled_from(("sharded", "replicated")),
    st.sampled_from(("project", "concat")),
    st.integers(1, 9),
)
def test_where_every_rank_is_a_host_all_bytes_cross(
    grid: tuple[int, int], schedule: str, residual: str, aggregate: str, batch: int
) -> None:
    m, n = grid
    assume(schedule != "heads" or 4 // n % m == 0)
    cost = transformer(m, n, schedule, batch=batch, residual=residual, aggregate=aggregate)
    found = between_hosts(cost, range(m * n))
    for rank in range(m * n):
        sent = {key: sum(count for (own, _), count in each.items() if own == rank) for key, each in found.items()}
        assert {key: count for key, count in sent.items() if count} == dict(cost.bytes(rank))
    assert between_hosts(cost, [0] * m * n) == {}


def test_bytes_between_hosts_by_hand() -> None:
    """2 x 2, batch 3, 6 tokens each: of slices that are on two hosts, slice 0 keeps one sample and sends two."""
    cost = transformer(2, 2, "batch")
    inside, across = between_hosts(cost, [0, 0, 1, 1]), between_hosts(cost, [0, 1, 0, 1])
    assert not any(key.startswith("all_to_all") for key in inside)
    sample = 6 * 3 * 2 * 4 * 4  # tokens, of Q, K and V 2 heads' 4 features of fp32
    # In each of two layers, of two slice groups.
    assert across["all_to_all/attention.qkv"] == {(0, 1): 2 * 2 * 2 * sample, (1, 0): 2 * 2 * sample}
    # 5 tokens a rank are gathered by the other host's two ranks, of both layers.
    assert inside["all_gather/attention.enter"] == {(0, 1): 2 * 2 * 2 * 5 * 16 * 4, (1, 0): 2 * 2 * 2 * 5 * 16 * 4}
    assert inside["all_gather/attention.enter"] == across["all_gather/attention.enter"]
