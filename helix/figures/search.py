"""How long a search over layouts takes as the devices grow."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from helix.config.words import figure
from helix.figures.style import SMALL, STYLE, TEXT, caption, look, picture


@rc_context(STYLE)
def search_growth(content: dict[str, Any], about: str = "") -> Figure:
    """Processor time over devices, both axes logarithmic; bars from the fastest to the slowest repeat.

    Args:
        content: as `python -m helix plan --growth` writes it.
    """
    chart = picture(TEXT, 3.6)
    axes = chart.subplots()
    searches = content["searches"]
    for place, mode in enumerate(dict.fromkeys(one["mode"] for one in searches)):
        own = [one for one in searches if one["mode"] == mode]
        runs, middle = [one["processor_s"]["runs"] for one in own], [one["processor_s"]["median"] for one in own]
        below = [each - min(all_of) for each, all_of in zip(middle, runs, strict=True)]
        above = [max(all_of) - each for each, all_of in zip(middle, runs, strict=True)]
        label = f"{mode}: {own[0]['layouts']:,} .. {own[-1]['layouts']:,} layouts"
        axes.errorbar([one["devices"] for one in own], middle, yerr=[below, above], label=label, **look(place))
    xs = sorted({one["devices"] for one in searches})
    for devices, limit_s in ((int(key), value) for key, value in content["limits_s"].items()):  # JSON's keys are text
        if devices in xs:
            axes.plot([devices], [limit_s], marker="_", markersize=20, markeredgewidth=2, color="black")
            words = f"limit at {devices:,}: {limit_s:g} s"
            axes.annotate(words, (devices, limit_s), (-13, 0), textcoords="offset points", ha="right", va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(top=20)
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: figure(value))
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.grid()
    axes.legend(loc="upper left")
    axes.set_xlabel("devices")
    axes.set_ylabel("processor time of a search, s")
    axes.set_title("Search time as the devices grow")
    where = f"{content['model']} on {content['hardware']}, batch {content['batch']} x {content['length']}"
    repeats = len(searches[0]["processor_s"]["runs"])
    caption(chart, where, f"one core, median of {repeats}, bars from the fastest to the slowest", about)
    return chart
