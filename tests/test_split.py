"""Compute, transfer and wait: exact on made-up steps, and what a late rank costs the others on a real one."""

from __future__ import annotations

import socket
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks

from helix import Grid
from helix.comm import collectives
from helix.comm.mesh import Mesh
from helix.comm.record import Span, record
from helix.study.split import Parts, Step, split


def span(key: str, ranks: tuple[int, ...], start: float, end: float, blocked: float | None = None) -> Span:
    return Span(key, ranks, start, end, start if blocked is None else blocked)


def seconds(parts: Parts) -> list[float]:
    return [parts.compute_s, parts.transfer_s, parts.wait_s]


# Milliseconds: for each rank, what it computes before each of a few collectives and after the last.
computing = st.integers(1, 4).flatmap(
    lambda calls: st.lists(
        st.lists(st.integers(0, 50), min_size=calls + 1, max_size=calls + 1), min_size=1, max_size=4
    )
)


@given(computing, st.integers(0, 50), st.floats(0, 1e6))
def test_made_up_delays_are_found(computing: list[list[int]], transfer: int, zero: float) -> None:
    """Every collective takes `transfer` ms from when its last rank has come; all of one name."""
    ranks = tuple(range(len(computing)))
    spans: list[list[Span]] = [[] for _ in ranks]
    now, waited = [0.0] * len(ranks), [0.0] * len(ranks)
    for call in range(len(computing[0]) - 1):
        starts = [time + mine[call] for time, mine in zip(now, computing, strict=True)]
        end = max(starts) + transfer
        for rank, start in enumerate(starts):
            spans[rank].append(span("all_gather/x", ranks, zero + start / 1e3, zero + end / 1e3))
            waited[rank] += max(starts) - start
            now[rank] = end
    steps = [
        Step(zero, zero + (time + mine[-1]) / 1e3, theirs, "host")
        for time, mine, theirs in zip(now, computing, spans, strict=True)
    ]
    result = split(steps)
    assert result is not None
    for parts, mine, wait in zip(result.ranks, computing, waited, strict=True):
        # The clock's zero is up to 1e6 s away, where doubles are 1e-10 s apart.
        expected = [sum(mine) / 1e3, (len(mine) - 1) * transfer / 1e3, wait / 1e3]
        assert seconds(parts) == pytest.approx(expected, abs=1e-8)


times = st.floats(0, 1)
any_span = st.builds(
    lambda key, ranks, marks: span(key, ranks, marks[0], marks[2], marks[1]),
    st.sampled_from(["all_gather/x", "send/x", "recv/x", "all_reduce/y"]),
    st.sampled_from([(0, 1), (1, 0)]),
    st.tuples(times, times, times).map(sorted),
)


@given(st.lists(st.tuples(times, times, st.lists(any_span, max_size=6)), min_size=1, max_size=3))
def test_parts_add_up_to_the_step_whatever_the_spans(ranks: list[tuple[float, float, list[Span]]]) -> None:
    """Also where spans overlap, stick out of the step, or have no partner."""
    result = split([Step(min(a, b), max(a, b), spans, "host") for a, b, spans in ranks])
    assert result is not None
    for parts, (a, b, _) in zip(result.ranks, ranks, strict=True):
        assert min(seconds(parts)) >= 0
        assert sum(seconds(parts)) == pytest.approx(abs(a - b), abs=1e-12)
    assert sum(seconds(result.mean)) == pytest.approx(sum(abs(a - b) for a, b, _ in ranks) / len(ranks), abs=1e-12)


def test_a_send_meets_its_receive() -> None:
    """Rank 0 sends at 3, goes on computing, and waits from 8 to 9; rank 1 has waited since 1 and has it at 5."""
    sent = [span("send/pp", (0, 1), 3, 9, 8), span("recv/pp", (1, 0), 9.25, 9.5)]
    received = [span("recv/pp", (0, 1), 1, 5), span("send/pp", (1, 0), 9, 9.5, 9.5)]
    result = split([Step(0, 10, sent, "host"), Step(0, 10, received, "host")])
    assert result is not None
    assert [seconds(parts) for parts in result.ranks] == [[8.75, 1.25, 0], [6, 2, 2]]


def test_calls_of_other_groups_are_no_partners() -> None:
    first, second = span("all_gather/x", (0, 1), 1, 3), span("all_gather/x", (0, 2), 1, 3)
    spans = [
        [first, second._replace(start_s=3, end_s=4, blocked_s=3)],
        [first._replace(start_s=2, blocked_s=2)],
        [second._replace(end_s=4)],
    ]
    result = split([Step(0, 4, theirs, "host") for theirs in spans])
    assert result is not None
    assert [parts.wait_s for parts in result.ranks] == [1, 0, 2]


def test_several_machines_have_no_common_clock() -> None:
    assert split([Step(0, 1, [], "a"), Step(0, 1, [], "b")]) is None


def run_late(late: int, delay_s: float) -> Step:
    axis = Mesh(Grid(m=3, n=1)).slice
    x = torch.ones(4)
    collectives.all_gather(x, axis, "warm-up")
    dist.barrier()
    start = time.monotonic()
    with record() as log:
        if dist.get_rank() == late:
            time.sleep(delay_s)
        collectives.all_gather(x, axis, "test")
    return Step(start, time.monotonic(), log.spans, socket.gethostname())


def test_the_others_wait_for_a_late_rank() -> None:
    delay = 0.05
    result = split(on_ranks(3, run_late, 1, delay))
    assert result is not None
    late, others = result.ranks[1], [result.ranks[0], result.ranks[2]]
    assert late.wait_s == 0
    assert late.compute_s >= delay
    # Ranks leave the barrier at slightly different times, and on a loaded machine the sleeper wakes up late.
    assert all(delay - 0.02 < other.wait_s < delay + 0.2 for other in others)
    assert all(other.compute_s < delay for other in others)
