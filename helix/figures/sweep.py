"""A sweep's tokens/s: over m x n as a heat map, and of every job as a bar with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helix.config.words import figure
from helix.figures.style import MAP, PALE, STYLE, TEXT, caption, categories, cell, picture, require

if TYPE_CHECKING:
    import pandas as pd

MOST_BARS = 40


@rc_context(STYLE)
def heat_map(grids: pd.DataFrame, others: str = "", about: str = "") -> Figure:
    """Tokens/s over m (rows) and n (columns); what was not measured is hatched, with what became of it.

    Args:
        grids: the rows of a sweep's table, of Helix's grids. Of several jobs with one (m, n) the fastest is shown, and
            the title says so.
        others: the overrides that these jobs have in common and that other jobs of the sweep have not.
    """
    require(grids, "m", "n", "status", "tokens_per_s")
    ms, ns = sorted(set(grids["m"])), sorted(set(grids["n"]))
    chart = picture(min(TEXT, 2.0 + 0.8 * len(ns)), 1.5 + 0.4 * len(ms))
    axes = chart.subplots()
    done = grids[grids["status"] == "done"]
    low, high = (done["tokens_per_s"].min(), done["tokens_per_s"].max()) if len(done) else (0.0, 1.0)
    norm, colours = Normalize(low, max(high, low * 1.001)), colormaps[MAP]
    for row, m in enumerate(ms):
        for column, n in enumerate(ns):
            here = grids[(grids["m"] == m) & (grids["n"] == n)]
            fastest = here[here["status"] == "done"]["tokens_per_s"].max()
            if fastest == fastest:  # not NaN: measured
                cell(axes, column, row, figure(fastest), colours(norm(fastest)))
            elif len(here):  # the others the sweep did not ask for: they stay white
                status = here["status"].iloc[0]
                words = {"skipped": "cannot run", "open": "not run"}.get(status, status)
                cell(axes, column, row, words, PALE, hatch="////")
    axes.set(
        xlim=(-0.5, len(ns) - 0.5), ylim=(len(ms) - 0.5, -0.5), xlabel="n, head groups", ylabel="m, feature slices"
    )
    axes.set_xticks(range(len(ns)), [str(n) for n in ns])
    axes.set_yticks(range(len(ms)), [str(m) for m in ms])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    repeated = done.duplicated(["m", "n"]).any()
    axes.set_title(
        "Tokens/s by grid" + (f"\n{others}" if others else "") + ("\nbest of each cell" if repeated else "")
    )
    if len(done):
        bar = chart.colorbar(
            ScalarMappable(norm, colours), ax=axes, label="tokens/s", pad=0.03, format=lambda value, _: figure(value)
        )
        bar.outline.set_visible(False)
    caption(chart, about)
    return chart


@rc_context(STYLE)
def bars(frame: pd.DataFrame, about: str = "") -> Figure:
    """Tokens/s of each measured job with its 95 % interval, the fastest on top; at most `MOST_BARS` of them.

    Args:
        frame: a sweep's table.
    """
    require(frame, "label", "status", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high")
    done = frame[frame["status"] == "done"].sort_values("tokens_per_s", ascending=False)
    shown = done.head(MOST_BARS)
    chart = picture(TEXT, 1.0 + 0.19 * len(shown))
    axes = chart.subplots()
    errors = [shown["tokens_per_s"] - shown["tokens_per_s_low"], shown["tokens_per_s_high"] - shown["tokens_per_s"]]
    axes.barh(
        range(len(shown)),
        shown["tokens_per_s"],
        height=0.66,
        color=colormaps[MAP](0.7),
        xerr=[error.to_numpy() for error in errors],
        error_kw={"ecolor": "black", "elinewidth": 1.0},
    )
    categories(axes, [str(label) for label in shown["label"]])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: figure(value))
    axes.grid(axis="x")
    axes.set_xlabel("tokens/s, mean and 95 % interval over runs")
    axes.set_title(
        "Tokens/s by method" + (f": the fastest {len(shown)} of {len(done)}" if len(done) > len(shown) else "")
    )
    caption(chart, about)
    return chart
