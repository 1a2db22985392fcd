"""What a schedule moves inside an m-group: which block of Q, K, V and O each rank holds before, while and after.

A block is a thing (a sample, a head or a token) by a slice of its features. Every rank starts with one slice of all
things, and ends with one slice of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helix.figures.style import DARK, SMALL, STYLE, TEXT, picture, shade
from helix.partition.schedules import row_chunks

Held: TypeAlias = frozenset[tuple[int, int]]  # (thing, slice)
Things: TypeAlias = Literal["samples", "heads", "tokens"]

_PLANE, _GAP = 0.40, 0.07  # inches: a plane's side, and what is between two
_RANK = 0.50  # inches from one rank's planes to the next one's
_HEAD = 0.52  # inches above the first schedule
_FIRST, _CORE, _LAST = 1.18, 3.40, 6.02  # inches from the left, of the planes before, while and after


@dataclass(frozen=True)
class Moves:
    """One schedule.

    Args:
        things: what a plane's rows are; dims: of Q, K, V while computing, in the sharded notation.
        before, after: the exchanges around the core attention, in words; empty for none.
    """

    things: Things
    dims: str
    before: str
    after: str


MOVES: dict[str, Moves] = {
    "batch": Moves("samples", "[B@slice, T, H, D]", "all-to-all\nQ, K, V", "all-to-all\nO"),
    "heads": Moves("heads", "[B, T, H@slice, D]", "all-to-all\nQ, K, V", "all-to-all\nO"),
    "rows": Moves("tokens", "q [B, T@slice, H, D]", "all-to-all Q,\nall-gather K, V", "all-to-all\nO"),
    "gather": Moves("tokens", "q, k [B, T, H, D]", "all-gather\nQ, K", ""),
    "perslice": Moves("tokens", "[B, T, H, D@slice]", "", ""),
}


def held(schedule: str, tensor: str, rank: int, m: int) -> Held:
    """The blocks of a tensor that a rank has while it computes, of 2 m things and m slices."""
    everything = frozenset((thing, part) for thing in range(2 * m) for part in range(m))
    own = frozenset((thing, rank) for thing in range(2 * m))
    if schedule == "perslice" or (schedule == "gather" and tensor in "VO"):
        return own
    if schedule == "gather" or (schedule == "rows" and tensor in "KV"):
        return everything
    dealt = row_chunks(2 * m, m, causal=schedule == "rows")[rank]
    return frozenset(block for block in everything if any(block[0] in run for run in dealt))


@rc_context(STYLE)
def exchange(m: int = 2, schedules: Sequence[str] = tuple(MOVES)) -> Figure:
    """A row for each schedule, in it one for each rank of an m-group of 2 to 4; the shade is who held a block first.

    `rows` is drawn as causal attention deals them, zig-zag.

    Raises:
        ValueError: if m or a schedule is none of those that can be drawn.
    """
    if not 2 <= m <= 4:
        raise ValueError(f"an exchange is drawn for m of 2 to 4, not {m}")
    unknown = [name for name in schedules if name not in MOVES]
    if unknown:
        raise ValueError(f"there is no picture of schedule {unknown[0]!r}; choose from: {', '.join(MOVES)}")
    row = m * _RANK + 0.22
    tall = _HEAD + row * len(schedules)
    chart = picture(TEXT, tall, layout=None)
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, TEXT), ylim=(tall, 0))
    axes.set_axis_off()
    for x, words in ((_FIRST, "held: one slice of all"), (_CORE, "while computing"), (_LAST, "then")):
        axes.text(x, 0.11, words, va="center", fontsize=8)
    axes.text(_FIRST - 0.06, 0.36, "rank j", ha="right", va="bottom", fontsize=SMALL, color=DARK)
    for place, schedule in enumerate(schedules):
        top = _HEAD + place * row
        axes.plot([0.05, TEXT - 0.05], [top - 0.12] * 2, color="0.7", linewidth=0.6)
        _schedule(axes, schedule, m, top)
    for x, letters in ((_FIRST, "QKV"), (_CORE, "QKVO"), (_LAST, "O")):
        for place, letter in enumerate(letters):
            axes.text(x + place * (_PLANE + _GAP) + _PLANE / 2, 0.36, letter, ha="center", va="bottom", fontsize=8)
    return chart


def _schedule(axes: Axes, schedule: str, m: int, top: float) -> None:
    moves = MOVES[schedule]
    middle = top + (m * _RANK - 0.10) / 2
    axes.text(0.05, middle - 0.20, schedule, va="center", fontsize=8.5, weight="bold")
    axes.text(0.05, middle, f"down: {moves.things}", va="center", fontsize=SMALL)
    axes.text(0.05, middle + 0.16, "across: features", va="center", fontsize=SMALL)
    for rank in range(m):
        y = top + rank * _RANK
        axes.text(_FIRST - 0.06, y + _PLANE / 2, f"{rank}", ha="right", va="center", fontsize=SMALL, color=DARK)
        own = held("perslice", "Q", rank, m)
        for place in range(3):
            _plane(axes, own, m, _FIRST + place * (_PLANE + _GAP), y)
        for place, tensor in enumerate("QKVO"):
            _plane(axes, held(schedule, tensor, rank, m), m, _CORE + place * (_PLANE + _GAP), y)
        _plane(axes, own, m, _LAST, y)
    _arrow(axes, _FIRST + 3 * (_PLANE + _GAP), _CORE - 0.04, middle, moves.before)
    _arrow(axes, _CORE + 4 * (_PLANE + _GAP), _LAST - 0.04, middle, moves.after)
    axes.text(
        _CORE + 2 * (_PLANE + _GAP) - _GAP / 2,
        top + m * _RANK - 0.01,
        moves.dims,
        ha="center",
        va="center",
        fontsize=SMALL,
    )


def _plane(axes: Axes, blocks: Held, m: int, x: float, y: float) -> None:
    wide, high = _PLANE / m, _PLANE / (2 * m)
    for thing in range(2 * m):
        for part in range(m):
            mine = (thing, part) in blocks
            face = shade(part, m) if mine else "white"
            edge = "white" if mine else "0.82"
            spot = (x + part * wide, y + thing * high)
            axes.add_patch(Rectangle(spot, wide, high, facecolor=face, edgecolor=edge, linewidth=0.5, zorder=1 + mine))
    axes.add_patch(Rectangle((x, y), _PLANE, _PLANE, facecolor="none", edgecolor=DARK, linewidth=0.5, zorder=3))


def _arrow(axes: Axes, start: float, end: float, y: float, words: str) -> None:
    """From one stage to the next, with what moves above it."""
    style = {"arrowstyle": "->" if words else "-", "linestyle": "-" if words else ":", "color": DARK, "linewidth": 0.8}
    axes.annotate("", (end, y), (start, y), arrowprops=style | {"shrinkA": 0, "shrinkB": 0})
    axes.text((start + end) / 2, y - 0.05, words or "nothing", ha="center", va="bottom", fontsize=SMALL)
