"""Every figure drawn once from small data: what is on it, that its words fit beside each other, its greys."""

from __future__ import annotations

import itertools
import operator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from drawable import BASELINES, CLAIMS, ERRORS, FIGURES, LOSSES, PANEL, RATIOS, TRAFFIC
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from helix.figures.attention import attention_maps
from helix.figures.claims import claimed_and_found
from helix.figures.errors import error_of
from helix.figures.exchange import MOVES, exchange, held
from helix.figures.growth import bytes_inside
from helix.figures.losses import curves
from helix.figures.maps import winning_map
from helix.figures.ownership import ownership
from helix.figures.ratios import forest, ratios
from helix.figures.style import SCHEDULES, SMALL, look, luminance, picture, save, shade
from helix.figures.traffic import bytes_of
from helix.partition.grid import Grid, PartitionError


def words(chart: Figure) -> list[Text]:
    """All that is written, but for ticks that lie off their axis and axes that are switched off."""
    hidden: set[int] = set()
    for axes in (one for one in chart.findobj(Axes) if isinstance(one, Axes)):
        for axis, limits in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            if not axes.axison:
                hidden |= {id(one) for one in axis.findobj(Text)}
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not limits[0] <= tick.get_loc() <= limits[1]:
                    hidden |= {id(tick.label1), id(tick.label2)}
    found = [one for one in chart.findobj(Text) if isinstance(one, Text) and id(one) not in hidden]
    return [one for one in found if one.get_visible() and one.get_text().strip()]


@pytest.mark.parametrize("name", FIGURES)
def test_words_fit_and_do_not_cover_each_other(name: str) -> None:
    chart = FIGURES[name]()
    FigureCanvasAgg(chart).draw()
    shown = words(chart)
    assert shown
    assert chart.get_figwidth() <= 6.5
    assert {one.get_text(): one.get_fontsize() for one in shown if one.get_fontsize() < SMALL} == {}
    boxes = [(one.get_text(), one.get_window_extent()) for one in shown]
    canvas = chart.bbox
    outside = [
        said for said, box in boxes
        if box.x0 < canvas.x0 - 1 or box.x1 > canvas.x1 + 1 or box.y0 < canvas.y0 - 1 or box.y1 > canvas.y1 + 1
    ]  # fmt: skip
    assert outside == []
    one_px = [(said, box.padded(-1)) for said, box in boxes]
    covered = [(a, b) for (a, first), (b, other) in itertools.combinations(one_px, 2) if first.overlaps(other)]
    assert covered == []
    for legend in chart.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in chart.axes)


def test_looks_differ_in_grey() -> None:
    """Two series by their dash and their marker; two areas by their shade."""
    for first, other in itertools.combinations([look(place) for place in range(6)], 2):
        assert first["linestyle"] != other["linestyle"]
        assert first["marker"] != other["marker"]
        assert first["color"] != other["color"]
    for first, other in itertools.combinations(SCHEDULES.values(), 2):
        assert first["marker"] != other["marker"]
        assert first["linestyle"] != other["linestyle"]
    for neighbour in range(3):
        assert abs(luminance(look(neighbour)["color"]) - luminance(look(neighbour + 1)["color"])) > 0.25
    for count in range(2, 9):
        greys = [luminance(shade(place, count)) for place in range(count)]
        assert all(after - before > 0.55 / count for before, after in itertools.pairwise(greys))


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_a_file_is_the_same_every_time(ending: str, tmp_path: Path) -> None:
    first, again = (save(forest(RATIOS), tmp_path / f"{name}{ending}").read_bytes() for name in "ab")
    assert first == again
    assert len(first) > 5_000
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending])


def test_a_notebook_shows_a_figure() -> None:
    assert picture(1, 1)._repr_png_().startswith(b"\x89PNG")


def test_every_block_has_its_owner() -> None:
    chart = ownership(Grid(2, 2), 4, 2, 8)
    for axes, heads in zip(chart.axes[:2], (4, 2), strict=True):
        assert [one.get_text() for one in axes.texts] == ["(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)"]
        filled = [one for one in axes.patches if isinstance(one, Rectangle) and one.get_fill()]
        area = sum(one.get_width() * one.get_height() for one in filled if one.get_facecolor()[3])
        assert area == heads * 8  # each head and feature once
        assert len({(one.get_facecolor(), one.get_hatch()) for one in filled if one.get_facecolor()[3]}) == 4
    assert [one.get_text() for one in chart.axes[2].texts] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    with pytest.raises(PartitionError, match="n=3 does not divide kv_heads=2"):
        ownership(Grid(2, 3), 4, 2, 8)


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("schedule", MOVES)
def test_what_ranks_hold_is_enough_and_no_more(schedule: str, m: int) -> None:
    """Each rank can compute its output from what it holds, and all outputs together are whole."""
    everything = {(thing, part) for thing in range(2 * m) for part in range(m)}
    blocks = {tensor: [held(schedule, tensor, rank, m) for rank in range(m)] for tensor in "QKVO"}
    assert set().union(*blocks["O"]) == everything
    assert sum(map(len, blocks["O"])) == len(everything)  # nobody computes another's
    for query, key, value, out in zip(*blocks.values(), strict=True):
        assert {thing for thing, _ in out} == {thing for thing, _ in query}
        assert out <= query
        assert {part for _, part in out} == {part for _, part in value}
        exact = {part for _, part in query} == {part for _, part in key} == set(range(m))
        assert exact == (schedule != "perslice")


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="an exchange is drawn for m of 2 to 4, not 5"):
        exchange(5)
    with pytest.raises(ValueError, match="no picture of schedule 'score'; choose from: batch, heads"):
        exchange(2, ("score",))
    with pytest.raises(ValueError, match="the frame lacks ratio"):
        forest(RATIOS.drop(columns="ratio"))
    with pytest.raises(ValueError, match="the frame has none"):
        forest(RATIOS.head(0))
    with pytest.raises(ValueError, match="at least one method"):
        bytes_of({})
    with pytest.raises(ValueError, match="smooth must be 1 to 20 steps, not 21"):
        curves(LOSSES, smooth=21)


def said(chart: Figure) -> list[str]:
    return [one.get_text() for axes in chart.axes for one in axes.texts]


def test_ratios_have_their_figures_beside_them() -> None:
    chart = forest(RATIOS)
    assert said(chart) == ["dense", "2.00 (1.80 .. 2.20)", "0.97 (0.90 .. 1.05)", "moe", "did not run"]
    points = [line for line in chart.axes[0].lines if line.get_marker() in ("o", "D")]
    assert [(one.get_marker(), one.get_markerfacecolor()) for one in points] == [("o", "black"), ("D", "white")]
    assert chart.axes[0].get_xscale() == "log"
    alone = ratios(BASELINES.drop_duplicates("label"))
    assert alone.axes[0].get_yticklabels()[0].get_text() == "helix_2x2 seq_len=64 / tp4"


def test_bytes_are_stacked_by_collective_and_compared() -> None:
    chart = bytes_of(TRAFFIC)
    assert said(chart) == ["4.5 MB, as predicted", "3 MB, predicted: 2 MB", "0 B, as predicted"]
    widths = [one.get_width() for one in chart.axes[0].patches if one.get_width()]
    assert widths == [4e6, 5e5, 4e6, 5e5, 3e6, 2e6]
    names = [one.get_text() for one in chart.legends[0].get_texts()]
    assert names == ["all-gather", "all-reduce", "all-to-all", "counted (upper)", "predicted (lower)"]


def test_errors_of_nothing_are_at_the_left_end() -> None:
    single, double = error_of(ERRORS, {"fp32": 1e-5, "fp64": 1e-12}).axes
    assert (single.get_title(), double.get_title()) == ("", "")
    assert single.get_title(loc="left") == "fp32; dashed: 1e-05"
    at = [float(line.get_xdata()[0]) for line in single.lines if line.get_marker() != "None"]
    assert at[3] == pytest.approx(single.get_xlim()[0])
    assert at[:3] == [2e-7, 0.8, 0.8]
    assert single.get_xticklabels()[0].get_text() == "0"


@pytest.mark.parametrize("name", ["errors", "growth", "bytes_inside", "settings_within_rounding"])
def test_no_exponent_is_smaller_than_what_is_readable(name: str) -> None:
    """Mathematical text has exponents of 0.7 times its size."""
    chart = FIGURES[name]()
    chart.draw_without_rendering()
    assert [one.get_text() for one in chart.findobj(Text) if "$" in one.get_text()] == []


def test_bytes_are_drawn_where_there_are_any() -> None:
    points = pd.DataFrame(
        {"schedule": ["batch", "batch", "perslice", "perslice"], "x": [64, 128] * 2, "bytes": [10, 20, 0, 0]}
    )
    (axes,) = bytes_inside(points, points.assign(x=points["x"] * 3)).axes
    counted, closed = axes.lines
    assert (list(counted.get_xdata()), list(counted.get_ydata())) == ([64, 128], [10, 20])
    assert list(closed.get_xdata()) == [192, 384]
    assert list(axes.get_xticks()) == [64, 128]


def test_what_a_logarithm_cannot_show_is_refused() -> None:
    with pytest.raises(ValueError, match="found has to be above 0 and finite, not 0"):
        claimed_and_found(CLAIMS.assign(found=0.0))
    with pytest.raises(ValueError, match="low has to be above 0 and finite, not -1"):
        forest(RATIOS.assign(low=-1.0))


def test_weights_of_attention_are_from_0_to_1() -> None:
    one, two, _ = attention_maps({"a": np.eye(8), "b": np.full((8, 8), 0.125)}).axes
    assert [axes.images[0].get_clim() for axes in (one, two)] == [(0, 1), (0, 1)]
    assert list(two.get_xticks()) == [0, 4]
    with pytest.raises(ValueError, match="'scores' has to be a matrix"):
        attention_maps({"scores": np.eye(4) * 2})
    with pytest.raises(ValueError, match="one to four maps, and there are 0"):
        attention_maps({})


def test_the_better_slicing_is_the_darker_its_cell_in_grey() -> None:
    cells = [
        PANEL["cells"][0] | {"x": x, "ratio": ratio, "legal": True}
        for x, ratio in enumerate((0.5, 0.8, 1.0, 1.25, 2.0))
    ]
    patches = winning_map([{**PANEL, "cells": cells}]).axes[0].patches
    assert len(patches) == 5
    greys = [luminance(each.get_facecolor()[:3]) for each in patches]
    assert greys == sorted(greys, reverse=True)
    assert min(itertools.starmap(operator.sub, itertools.pairwise(greys))) > 0.03


def test_distances_within_rounding_are_the_main_panel() -> None:
    chart = FIGURES["settings_within_rounding"]()
    loss, validation, gap = chart.axes
    assert (len(loss.lines), len(validation.lines)) == (2, 2)  # the references'
    assert gap.get_position().height > 1.2 * loss.get_position().height
    looks = {(one.get_color(), one.get_markerfacecolor(), one.get_marker(), one.get_linestyle()) for one in gap.lines}
    assert len(gap.lines) == len(looks) == 4
    assert len({str(one.get_markevery()) for one in gap.lines}) == 4
    assert len(chart.legends[0].get_texts()) == 6


def test_claims_are_beside_what_was_found() -> None:
    chart = claimed_and_found(CLAIMS)
    assert [axes.get_xlabel() for axes in chart.axes] == ["tokens/s", "relative error"]
    assert said(chart)[0] == "1,580,000 claimed, 420,000 found"
    assert [one.get_text() for one in chart.legends[0].get_texts()] == ["claimed", "measured here", "modelled here"]


def test_differences_are_of_pairs() -> None:
    above, below = curves(LOSSES).axes
    assert len(above.lines) == 2 * (3 + 1)
    assert np.asarray(below.lines[0].get_ydata()) == pytest.approx(np.full(20, 0.1))
    assert below.get_title(loc="left") == "Difference to helix_2x2, at equal seeds"
    assert len(curves(LOSSES[LOSSES["setting"] == "helix_2x2"]).axes) == 1


def test_a_map_says_what_each_place_is() -> None:
    chart = winning_map([PANEL])
    assert [one.get_text() for one in chart.axes[0].texts] == ["1.30", "0.40", "only", "-", "1.00", "2.40"]
    assert [one.get_weight() for one in chart.axes[0].texts[:2]] == ["bold", "normal"]
    assert not chart.axes[1].axison
