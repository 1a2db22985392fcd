"""Bytes by collective: those that were counted while a method ran, beside those that its closed forms say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from helix.config.words import size
from helix.figures.style import DARK, SMALL, STYLE, TEXT, caption, categories, ink, key, legend, picture, shade

Bytes: TypeAlias = Mapping[str, int]  # by collective/place
_HATCH = "//////"
_BAR = 0.36


@rc_context(STYLE)
def bytes_of(traffic: Mapping[str, Mapping[str, Bytes]], *, about: str = "") -> Figure:
    """Two bars for each method, stacked by collective: what left a rank in one step, and what was predicted (hatched).

    Args:
        traffic: of each label `comm_bytes_per_rank_per_step` of a report: "executed" and "predicted", in bytes by
            "all_gather/attention.enter" and the like.

    Raises:
        ValueError: if there is no method.
    """
    if not traffic:
        raise ValueError("bytes are drawn of at least one method, and none is given")
    methods = {
        label: [_collectives(found[name]) for name in ("executed", "predicted")] for label, found in traffic.items()
    }
    kinds = sorted({kind for pair in methods.values() for found in pair for kind in found})
    chart = picture(TEXT, 0.95 + 0.42 * len(methods))
    axes = chart.subplots()
    for place, pair in enumerate(methods.values()):
        for side, found in enumerate(pair):
            _bar(axes, place + (side - 0.5) * _BAR, found, kinds, predicted=bool(side))
        executed, predicted = (sum(found.values()) for found in pair)
        said = "as predicted" if pair[0] == pair[1] else f"predicted: {size(predicted)}"
        axes.annotate(
            f"{size(executed)}, {said}", (max(executed, predicted), place), (4, 0), textcoords="offset points",
            va="center", fontsize=SMALL, color=DARK,
        )  # fmt: skip
    most = max(sum(found.values()) for pair in methods.values() for found in pair)
    axes.set_xlim(0, max(1, most) * 1.42)  # with room for the words
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: size(round(value)))
    axes.grid(axis="x")
    axes.set_xlabel("bytes that leave a rank in one step")
    categories(axes, methods)
    handles = [key(kind.replace("_", "-"), shade(place, len(kinds))) for place, kind in enumerate(kinds)]
    counted = Patch(facecolor="white", edgecolor=DARK, linewidth=0.6, label="counted (upper)")
    said_so = Patch(facecolor="white", edgecolor=DARK, linewidth=0.6, hatch=_HATCH, label="predicted (lower)")
    legend(chart, [*handles, counted, said_so], 4)
    caption(chart, about)
    return chart


def _collectives(found: Bytes) -> Counter[str]:
    """Bytes by collective, wherever it was."""
    out: Counter[str] = Counter()
    for name, count in found.items():
        if count:
            out[name.partition("/")[0]] += count
    return out


def _bar(axes: Axes, y: float, found: Counter[str], kinds: list[str], predicted: bool) -> None:
    left = 0
    for place, kind in enumerate(kinds):
        face = shade(place, len(kinds))
        look: dict[str, Any] = {"hatch": _HATCH, "edgecolor": ink(face)} if predicted else {"edgecolor": "white"}
        axes.barh(y, found[kind], height=_BAR * 0.92, left=left, color=face, linewidth=0, **look)
        left += found[kind]
