"""What a plan is held against and drawn as: published tables, the papers, maps, known models, the search's growth."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import helix
from helix.figures.maps import winning_map
from helix.figures.search import search_growth
from helix.planner import catalogue, known, papers, published, winning
from helix.planner.candidates import Asked, candidates, methods
from helix.planner.work import Work
from helix.study import plan_growth


def test_published_tables_are_off_by_what_is_said() -> None:
    """None was fitted to. A change of the time model moves these: state the new ones with it."""
    errors = {table.name: (len(table.rows), table.median_error, table.worst.error) for table in published.tables()}
    assert errors == {
        "korthikanti_2022": (8, pytest.approx(0.119, abs=0.005), pytest.approx(-0.146, abs=0.005)),
        "narayanan_2021": (10, pytest.approx(0.177, abs=0.005), pytest.approx(0.223, abs=0.005)),
        "smith_2022": (3, pytest.approx(0.320, abs=0.005), pytest.approx(-0.338, abs=0.005)),
    }
    assert published.reached() == (pytest.approx(0.66, abs=0.005), pytest.approx(0.92, abs=0.005))  # as in planning.md


def test_the_papers_claim_is_beyond_every_layout_that_cuts_heads() -> None:
    """Also beyond the papers' own formula, which moves nothing inside an m-group."""
    one = papers.setting(papers.CLAIMS[0])
    grids = {(row.layout.grid.name, row.layout.prefill): row.tokens_per_s for row in one.grids}
    assert one.best.layout.name == "dp16"
    assert grids["helix_4x4", "perslice"] < one.claim.tokens_per_s[1] / 3
    assert grids["helix_4x4", "batch"] < grids["helix_4x4", "perslice"]
    assert min(grids, key=lambda each: grids[each]) == ("helix_16x1", "score")
    assert one.bound == pytest.approx(2.04e6, rel=0.01)
    assert one.reached == published.reached()


def test_every_setting_of_the_papers_has_every_schedule() -> None:
    """Sixteen ranks in five grids, six schedules for each m > 1, in passes that fit."""
    for one in papers.settings():
        assert len(one.grids) == 1 + 4 * 6
        assert {row.layout.ranks for row in (*one.grids, *one.rivals)} == {16}
        room = 0.92 * 80e9
        assert all(row.memory.total <= room for row in (*one.grids, *one.rivals, one.best))
        assert {"tp8_pp2", "tp16", "dp16"} <= {row.layout.name for row in one.rivals}
    assert [one.claim.tokens_per_s for one in papers.settings()][-1] == (0.85e6, 1.15e6)


def place(model: str, devices: int, goal: str, work: Work, asked: Asked) -> winning.Place:
    shape = catalogue.shape(catalogue.model(model), work.mode)
    return winning.Place(shape, catalogue.hardware("dgx_h100"), devices, work, goal, asked)


def test_the_map_of_where_slices_win() -> None:
    """9 heads, 3 of them key/value: one sequence leaves no other layout on all of 12 devices without stages."""
    work = Work("generate", 1, 1024, 16)
    spread, wide, linked = winning.panels(place("smollm2", 12, "tpot", work, Asked(stage=1)))
    said = {(one.x, one.y): one for one in spread.cells}
    assert not said["1/2", "1"].legal  # one device and a half
    assert not said["1", "1/4"].legal  # less than a sequence
    assert said["1", "1"].sliced is None  # three replicas: a prime number that divides no head's features
    many = said["4", "4"]
    assert many.sliced is not None
    assert many.rival is not None
    assert many.ratio == pytest.approx((many.rival.tpot_s or 0) / (many.sliced.tpot_s or 1))
    assert many.rival.layout.name == "dp12"
    assert [one.x for one in wide.cells if one.y == "1024"] == ["16", "32", "64"]  # 192 would leave one KV head of 1
    only = next(one for one in linked.cells if (one.x, one.y) == ("1", "1024"))
    assert only.rival is None
    assert only.sliced is not None
    assert only.sliced.layout.name == "helix_4x3"
    chart = winning_map([panel.as_dict() for panel in (spread, wide, linked)], "smollm2")
    drawn = [text.get_text() for text in chart.axes[2].texts]
    assert len(drawn) == len(linked.cells)
    assert set(drawn) == {"only"}
    assert "rivals: data, tensor, pipeline, m = 1 and their products" in written(chart)  # no cuts of a sequence


def written(chart: Figure) -> str:
    return " ".join(text.get_text() for text in chart.findobj(Text) if isinstance(text, Text))


def test_rivals_are_named_that_are_searched() -> None:
    experts = catalogue.shape(catalogue.model("qwen3_235b_a22b"), "forward")
    dense = catalogue.shape(catalogue.model("llama3_70b"), "forward")
    for shape, work, asked, cut in (
        (dense, Work("forward", 8, 4096), Asked(), True),
        (dense, Work("forward", 8, 4096), Asked(runnable=True), False),
        (dense, Work("generate", 8, 4096, 16), Asked(), False),
        (experts, Work("forward", 8, 4096), Asked(), False),
    ):
        found = {one.method for alike in candidates(shape, work, 8, asked) for one in alike}
        assert ({"context", "ulysses"} <= found, "context" in methods(shape, work, asked)) == (cut, cut)
    plan = helix.plan("llama3_70b", "dgx_h100", 8, mode="generate", batch=8)
    assert "Besides m > 1 the search knows data, tensor, pipeline, m = 1 and their products." in plan.assumptions


def test_faster_links_bring_sliced_layouts_nearer() -> None:
    work = Work("forward", 4, 4096)
    one = place("llama3_70b", 16, "throughput", work, Asked(stage=1, data=1))
    slow, fast = (winning._linked(one, times, 4096).cell("", "") for times in (winning.LINKS[0], winning.LINKS[-1]))
    assert slow.sliced is not None
    assert fast.sliced is not None
    assert fast.sliced.tokens_per_s > 2 * slow.sliced.tokens_per_s


def test_known_models_and_what_is_advised_for_them() -> None:
    work = Work("generate", 8, 8192, 64)
    rows = list(known.rows("dgx_h100", work, "tpot", Asked(), known.MODELS, (8, 16)))
    assert [(row.model, row.devices) for row in rows if row.plan is None] == [("deepseek_v3", 8)]
    assert "multi-head latent attention" in rows[0].refusal
    assert len(rows) == 1 + 2 * 4
    small = next(row for row in rows if row.model == "smollm2" and row.devices == 8)
    assert small.plan is not None
    assert small.plan.best.layout.name == "dp8"  # where the advice is not to slice
    assert small.ratio is not None
    assert small.ratio < 1
    alone = next(known.rows("dgx_h100", Work("train", 8, 4096), "throughput", Asked(), ["llama3_70b"], [8]))
    assert alone.plan is None
    assert alone.refusal.startswith("memory binds: llama3_70b needs at least")


def test_the_search_is_timed_and_drawn() -> None:
    points = plan_growth.measure(devices=(8, 1024), repeats=1)
    assert {(one.mode, one.devices) for one in points} == {
        (mode, count) for mode in ("forward", "train", "generate") for count in (8, 1024)
    }
    assert all(len(one.runs_s) == 1 and one.considered > 100 for one in points)
    chart = search_growth(plan_growth.as_dict(points))
    assert [text.get_text() for text in chart.axes[0].texts] == ["limit at 1,024: 1 s"]
    assert len(plan_growth.as_dict(points)["searches"]) == 6
