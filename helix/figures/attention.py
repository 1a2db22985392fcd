"""Which tokens look at which: attention weights as maps beside each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from helix.figures.style import MAP, STYLE, TEXT, caption, picture


@rc_context(STYLE)
def attention_maps(maps: Mapping[str, ArrayLike], *, group: int = 4, about: str = "") -> Figure:
    """A panel for each map, all on one scale from 0 to 1.

    Args:
        maps: title -> weights [queries, keys], from 0 to 1; at most four titles of at most 28 characters.
        group: tokens that belong together; lines separate such groups, and ticks are at their first tokens.

    Raises:
        ValueError: if there are no maps or more than four, or one is not a matrix of weights from 0 to 1.
    """
    if not 1 <= len(maps) <= 4:
        raise ValueError(f"this figure needs one to four maps, and there are {len(maps)}")
    weights = {title: np.asarray(weight, dtype=np.float64) for title, weight in maps.items()}
    for title, weight in weights.items():
        if weight.ndim != 2 or not ((weight >= 0) & (weight <= 1 + 1e-6)).all():
            raise ValueError(f"the map '{title}' has to be a matrix [queries, keys] of weights from 0 to 1")
    chart = picture(TEXT, 0.9 + 4.6 / max(len(maps), 3))
    panels = chart.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (title, weight) in zip(panels, weights.items(), strict=True):
        image = axes.imshow(weight, cmap=MAP, vmin=0, vmax=1)
        axes.set(title=title, xlabel="key")
        for ticks, edges, count in (
            (axes.set_xticks, axes.axvline, weight.shape[1]),
            (axes.set_yticks, axes.axhline, weight.shape[0]),
        ):
            ticks(range(0, count, group))
            for place in range(group, count, group):
                edges(place - 0.5, color="white", linewidth=0.5)
    panels[0].set_ylabel("query")
    bar = chart.colorbar(image, ax=list(panels), label="attention weight", shrink=0.8)
    bar.outline.set_visible(False)
    caption(chart, about)
    return chart
