"""Who owns what on an m x n grid: the plane of heads and features of each weight, cut among the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helix.figures.style import HATCHES, SMALL, STYLE, TEXT, ink, picture, shade
from helix.partition.grid import Grid, HeadLayout

_MOST = 4  # head groups or slices of which each block has room for a name and a hatch
_TALL = 0.17  # inches that a name needs
_WIDE = 4  # blocks across a plane that have room for a name with its brackets


@rc_context(STYLE)
def ownership(grid: Grid, heads: int, kv_heads: int | None = None, head_dim: int = 8, rope: bool = False) -> Figure:
    """The blocks of W_Q, W_K, W_V [E, H@head, D@slice] and W_O [H@head, D@slice, E] by rank (i, j).

    The shade is the slice j, the hatch the head group i. Key/value heads, where there are fewer, lie beside the query
    heads that attend to them. Above 4 x 4 blocks have no hatch and no name: the axes say both.

    Raises:
        PartitionError: if the grid does not divide the heads or the features.
    """
    grid.check(heads, kv_heads, head_dim, rope)
    layout = HeadLayout(heads, heads if kv_heads is None else kv_heads, head_dim, rope)
    tall = max(1.6, 0.24 * grid.n, min(3.5, _TALL * heads * grid.n / layout.kv_heads))
    chart = picture(TEXT, tall + 0.75)
    query, shared, mesh = chart.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    _plane(query, grid, layout, layout.heads, tall)
    query.set(title="$W_Q$ (columns), $W_O$ (rows)", ylabel="query head")
    _plane(shared, grid, layout, layout.kv_heads, tall)
    shared.set(title="$W_K$, $W_V$ (columns)", ylabel="key/value head")
    _mesh(mesh, grid)
    return chart


def _plane(axes: Axes, grid: Grid, layout: HeadLayout, count: int, tall: float) -> None:
    """Heads down, features across; `count` heads of them, each group's in the middle of its query heads."""
    named = tall * count / layout.heads / grid.n >= 0.9 * _TALL and max(grid.m, grid.n) <= _MOST
    ticks = []
    for i in range(grid.n):
        own, queries = grid.owned_heads(count, i), grid.owned_heads(layout.heads, i)
        top = queries.start + (len(queries) - len(own)) / 2
        ticks += [(top + place + 0.5, str(head)) for place, head in enumerate(own)]
        for j in range(grid.m):
            for run in _runs(grid.owned_features(layout, j)):
                _block(axes, grid, (i, j), (run.start, top, len(run), len(own)))
                if named:
                    words = f"({i}, {j})" if layout.head_dim <= _WIDE * len(run) else f"{i},{j}"
                    _name(axes, grid, (i, j), run.start + len(run) / 2, top + len(own) / 2, words)
        for place in range(1, len(own)):  # where one head ends and the next begins
            axes.plot([0, layout.head_dim], [top + place] * 2, color="white", linewidth=0.5, linestyle=":")
    edges = sorted(
        {edge for j in range(grid.m) for run in _runs(grid.owned_features(layout, j)) for edge in _ends(run)}
    )
    axes.set(xlim=(0, layout.head_dim), ylim=(layout.heads, 0), xlabel="feature of a head")
    axes.set_xticks(edges if len(edges) <= 9 else edges[:: (len(edges) + 7) // 8])
    room = max(1, round(0.13 * len(ticks) / (tall * count / layout.heads)))  # ticks for each one that has room
    axes.set_yticks([place for place, _ in ticks[::room]], [name for _, name in ticks[::room]])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _mesh(axes: Axes, grid: Grid) -> None:
    """The ranks themselves, which is the key to the blocks."""
    for i in range(grid.n):
        for j in range(grid.m):
            _block(axes, grid, (i, j), (j, i, 1, 1))
            rank = grid.rank(i, j)
            _name(axes, grid, (i, j), j + 0.5, i + 0.5, str(rank) if max(grid.m, grid.n) > 2 else f"rank {rank}")
    axes.set(xlim=(0, grid.m), ylim=(grid.n, 0), xlabel="slice j", ylabel="head group i", title="rank i m + j")
    axes.set_xticks([j + 0.5 for j in range(grid.m)], [str(j) for j in range(grid.m)])
    axes.set_yticks([i + 0.5 for i in range(grid.n)], [str(i) for i in range(grid.n)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _block(axes: Axes, grid: Grid, owner: tuple[int, int], place: tuple[float, float, float, float]) -> None:
    """The rectangle (x, y, width, height) of a rank; white around, so that what two ranks own does not touch."""
    i, j = owner
    face = shade(j, grid.m)
    hatch = HATCHES[i] if max(grid.m, grid.n) <= _MOST else ""
    x, y, width, height = place
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=ink(face), hatch=hatch, linewidth=0))
    axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor="white", linewidth=2, clip_on=False))


def _name(axes: Axes, grid: Grid, owner: tuple[int, int], x: float, y: float, words: str) -> None:
    face = shade(owner[1], grid.m)
    box = {"facecolor": face, "edgecolor": "none", "pad": 1.0}
    axes.text(x, y, words, ha="center", va="center", fontsize=SMALL, color=ink(face), bbox=box)


def _runs(features: list[int]) -> Iterator[range]:
    """Features that follow each other."""
    start = features[0]
    for before, after in zip(features, [*features[1:], -1], strict=True):
        if after != before + 1:
            yield range(start, before + 1)
            start = after


def _ends(run: range) -> tuple[int, int]:
    return run.start, run.stop
