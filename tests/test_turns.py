"""Whose turn it is, and what the steps of all ranks come to."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.comm.record import Span
from helix.study.measure import Measured, Recorded
from helix.study.report import MethodLabel, Schedules
from helix.study.results import RankResult, measurement, rival, step_seconds
from helix.study.trial import Trial
from helix.study.turns import Kind, take_turns

METHODS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=4, unique=True)
SIZES = st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)


def test_passes_go_there_and_back() -> None:
    turns = [turn for turn in take_turns(["a", "b", "c"], 1, 2, 2) if turn.kind is Kind.TIMED]
    assert "".join(turn.method for turn in turns) == "abccba" * 2
    assert [turn.run for turn in turns] == [0] * 6 + [1] * 6


@given(METHODS, *SIZES)
def test_every_method_gets_the_same_steps_on_the_same_tokens(
    methods: list[str], warmup: int, iterations: int, runs: int
) -> None:
    turns = list(take_turns(methods, warmup, iterations, runs))
    for name in methods:
        own = [turn for turn in turns if turn.method == name]
        assert Counter(turn.kind for turn in own) == +Counter(
            {Kind.WARMUP: runs * warmup, Kind.TIMED: runs * iterations, Kind.RECORDED: runs}
        )
        assert [turn.batch for turn in own] == list(range(runs * (warmup + iterations + 1)))
    ends = [number for number, turn in enumerate(turns) if turn.ends_pass]
    assert ends == list(range(len(methods) - 1, len(turns), len(methods)))


def rank(*steps: list[tuple[float, float]], host: str = "one", spans: list[Span] | None = None) -> RankResult:
    """A rank's runs, each of the steps given; the recorded step lasts from 0 to 1 s, or as long as its rank."""
    trial = Trial("mha_fp32_single", 1e-7, None, {}, {}, 10, 10, 20, 0, 0.2)
    recorded = [Recorded(0.0, 1.0, spans or []) for _ in steps]
    return RankResult(host, trial, Measured(list(steps), recorded))


def test_a_step_lasts_from_the_first_start_to_the_last_end() -> None:
    ranks = [rank([(0.0, 1.0), (5.0, 5.5)]), rank([(0.5, 2.0), (4.5, 5.0)])]
    assert step_seconds(ranks) == pytest.approx([(2.0 + 1.0) / 2])


def test_without_a_common_clock_a_step_is_its_slowest_ranks() -> None:
    ranks = [rank([(0.0, 1.0)]), rank([(100.0, 101.5)], host="two")]
    assert step_seconds(ranks) == pytest.approx([1.5])


def test_a_recorded_step_is_split_and_its_parts_add_up() -> None:
    meeting = [Span("all_gather/x", (0, 1), start, 0.8, start) for start in (0.2, 0.6)]
    ranks = [rank([(0.0, 1.0)], [(0.0, 1.1)], spans=[span]) for span in meeting]
    found = measurement(MethodLabel("m", 1, 2, Schedules(None)), ranks, tokens=1000)
    parts = [found.comm_ms_per_token, found.wait_ms_per_token, found.compute_ms_per_token]
    means = [part.mean for part in parts if part is not None]
    assert means == pytest.approx([0.2, 0.2, 0.6])  # us a token: 200 ms, (400 + 0) / 2 ms, (400 + 800) / 2 ms
    assert found.bubble is not None
    assert found.bubble.measured == 0


def test_the_bubble_is_what_a_stage_waits_for_the_first_and_after_the_last_microbatch() -> None:
    """Two stages of equal work, two microbatches of 0.25 s: each stage is idle a third of 0.75 s."""
    trial = rank([(0.0, 0.75)]).trial
    first = RankResult("one", trial, Measured([[(0.0, 0.5)]] * 2, [Recorded(0.0, 0.5, [])] * 2))
    wait = Span("recv/stage", (0, 1), 0.0, 0.25, 0.0)
    last = RankResult("one", trial, Measured([[(0.0, 0.75)]] * 2, [Recorded(0.0, 0.75, [wait])] * 2))
    found = measurement(MethodLabel("pp", 1, 1, Schedules(None), stage=2), [first, last], 10)
    assert found.bubble is not None
    assert found.bubble.measured == pytest.approx(1 / 3)
    assert found.bubble.predicted == 0.2


def test_the_ratio_is_the_baselines_time_over_the_main_methods() -> None:
    slow, fast = ([rank(*([(0.0, step)] for step in steps))] for steps in ((2.0, 2.2, 2.1), (1.0, 1.1, 1.05)))
    method = MethodLabel("m", 1, 1, Schedules(None))
    main, other = measurement(method, fast, 10), measurement(method, slow, 10)
    assert rival(other, main).paired.ratio == pytest.approx(2)
    assert np.isclose(main.tokens_per_s.runs[0], 10)
