"""Ratios with their intervals around 1: a forest of them, and those of a sweep's methods to their baselines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helix.figures.style import DARK, STYLE, TEXT, above_0, caption, legend, log_ticks, note, picture, require

if TYPE_CHECKING:
    import pandas as pd

KINDS = {"measured": "o", "modelled": "D"}
_ROW = 0.19  # inches


@rc_context(STYLE)
def forest(
    frame: pd.DataFrame, *, x_label: str = "times as fast", title: str = "", wide: float = TEXT, about: str = ""
) -> Figure:
    """Each row a ratio with its 95 % interval on a logarithmic axis, its figures at the right, under its group's name.

    Args:
        frame: columns `label`, `ratio`, `low`, `high`; perhaps `group`, and `kind` (measured or modelled; measured
            where there is none). A ratio that is NaN did not run, and an interval that is was not made.
        wide: inches.
    """
    require(frame, "label", "ratio", "low", "high")
    above_0(frame, "ratio", "low", "high")
    rows = list(_rows(frame))
    chart = picture(wide, 0.75 + _ROW * len(rows) + (0.2 if title else 0))
    axes = chart.subplots()
    for place, row in enumerate(rows):
        if isinstance(row, str):
            axes.annotate(
                row, (0, place), (-4, 0), ("axes fraction", "data"), "offset points",
                ha="right", va="center", weight="bold",
            )  # fmt: skip
        else:
            _draw(axes, place, row)
    axes.axvline(1, color=DARK, linewidth=0.8, linestyle="--", zorder=0)
    shown = [(place, row["label"]) for place, row in enumerate(rows) if not isinstance(row, str)]
    axes.set_yticks([place for place, _ in shown], [label for _, label in shown])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    _axis(axes, frame, 8 if wide > 5 else 4)
    meaning = " (95 % interval; filled where it is without 1)" if wide > 5 else "\n95 % interval, filled: without 1"
    axes.set_xlabel(f"{x_label}{meaning}", loc="right")
    axes.set_title(title)
    kinds = [kind for kind in KINDS if kind in set(frame["kind"])] if "kind" in frame else []
    if len(kinds) > 1:
        marks: dict[str, Any] = {"linestyle": "none", "color": "black", "markerfacecolor": "white"}
        legend(chart, [Line2D([], [], marker=KINDS[kind], label=kind, **marks) for kind in kinds], 2)
    caption(chart, about)
    return chart


def ratios(frame: pd.DataFrame, about: str = "") -> Figure:
    """How many times as fast as a baseline each job's main method is.

    Args:
        frame: a sweep's baselines.csv; a row without a ratio did not run, and says so.
    """
    require(frame, "label", "baseline", "ratio", "ratio_low", "ratio_high")
    grouped = 1 < frame["label"].nunique() < len(frame)
    rows = frame.rename(columns={"ratio_low": "low", "ratio_high": "high"})[["ratio", "low", "high"]].assign(
        group=frame["label"] if grouped else "",
        label=[
            f"{'' if grouped else own} / {name}" for own, name in zip(frame["label"], frame["baseline"], strict=True)
        ],
    )
    return forest(
        rows,
        x_label="times as fast as the baseline",
        title="Main method / baseline, taking turns in one launch",
        about=about,
    )


def _rows(frame: pd.DataFrame) -> Iterator[dict[str, Any] | str]:
    """The rows, and the name of each group before its own."""
    if "group" not in frame:
        yield from frame.to_dict("records")
        return
    for group, own in frame.groupby("group", sort=False):
        if group:
            yield str(group)
        yield from own.to_dict("records")


def _draw(axes: Axes, place: int, row: dict[str, Any]) -> None:
    ratio, low, high = (float(row[name]) for name in ("ratio", "low", "high"))
    if ratio != ratio:  # NaN
        said = "did not run"
    else:
        known = low == low
        face = "black" if known and (low > 1 or high < 1) else "white"
        if known:
            axes.plot([low, high], [place, place], color="black", linewidth=1.0)
        mark = KINDS[row.get("kind", "measured")]
        axes.plot(ratio, place, mark, color="black", markerfacecolor=face, markeredgecolor="black")
        said = in_words(ratio, low, high)
    note(axes, place, said)


def in_words(value: float, low: float, high: float) -> str:
    """With its interval, where it has one."""
    return f"{value:.2f} ({low:.2f} .. {high:.2f})" if low == low else f"{value:.2f}"


def _axis(axes: Axes, frame: pd.DataFrame, most: int) -> None:
    """All intervals, and 1."""
    found = frame[["ratio", "low", "high"]].astype(float).stack().dropna()
    low, high = (min(0.9, found.min() * 0.93), max(1.1, found.max() * 1.07)) if len(found) else (0.5, 2.0)
    log_ticks(axes, low, high, lambda value: f"{value:.2g}", most)
