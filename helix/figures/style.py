"""One style for all figures: sizes of print, colours that differ in grey too, and files that are the same every time.

A figure is as wide as it is printed (inches): a page's text or a column of it, so that a font's size is that on paper;
nothing is smaller than 7 pt. Colours are cividis, or those of Okabe and Ito, for every kind of colour vision; series
differ by marker, dash or hatch as well. `Figure` objects are made without pyplot, so that nothing needs a display or
is left behind.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.typing import ColorType

if TYPE_CHECKING:
    import pandas as pd

TEXT, COLUMN = 6.5, 3.2  # inches: a page's text, and one of two columns
SMALL = 7.0  # pt: the smallest that is printed
MAP = "cividis"
LINE, DARK, PALE = "0.85", "0.30", "0.92"  # of grids, of what explains, of what is empty
_DPI = 200
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "savefig.dpi": _DPI,
    # Text as text in a PDF, for reading and searching; as outlines in an SVG, whose reader may not have the font.
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "helix",
}
# What of a file's metadata would make two files of one figure differ: when it was made, and by which version.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (4, 1, 1, 1)), (0, (1.5, 1)), (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
_COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = "osD^vPX"
HATCHES = ("", "/////", ".....", "xxxxx", "-----", "\\\\\\\\\\", "+++++")
_STEPS = (
    tuple(step / 10 for step in range(10, 100)),
    (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)
# Each schedule looks the same in every figure.
SCHEDULES: dict[str, dict[str, Any]] = {
    "batch": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "heads": {"color": "#56B4E9", "marker": "s", "linestyle": (0, (6, 2))},
    "rows": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "gather": {"color": "#E69F00", "marker": "D", "linestyle": (0, (4, 1, 1, 1))},
    "score": {"color": "#D55E00", "marker": "v", "linestyle": (0, (3, 1))},
    "perslice": {"color": "black", "marker": "x", "linestyle": ":"},
}


class Picture(Figure):
    """A figure that a notebook shows, as a PNG."""

    def _repr_png_(self) -> bytes:
        with rc_context(STYLE), io.BytesIO() as out:
            self.savefig(out, format="png", dpi=150)
            return out.getvalue()


def picture(width: float, height: float, layout: Any = "constrained") -> Picture:
    """An empty figure of this size in inches."""
    return Picture(figsize=(width, height), layout=layout)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format that the file's name ends in, and return its path."""
    with rc_context(STYLE):  # read when a hatch is drawn or a file written, too
        figure.savefig(path, metadata=_METADATA.get(path.suffix.lower()))
    return path


def look(place: int) -> dict[str, Any]:
    """Colour, marker and dash of the series at this place, for a line; the first seven differ in all of them."""
    dash = _DASHES[place % len(_DASHES)]
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": dash,
    }


def marker(place: int) -> str:
    return _MARKERS[place % len(_MARKERS)]


def shade(place: int, count: int) -> ColorType:
    """Of `count` shades from dark to light, as even in grey as they are in colour."""
    colour: ColorType = colormaps[MAP](0.1 + 0.85 * place / (count - 1) if count > 1 else 0.75)
    return colour


def luminance(colour: ColorType) -> float:
    """Of a colour, 0 black to 1 white, as a grey print has it."""
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def ink(colour: ColorType) -> str:
    """What is readable on a colour."""
    return "white" if luminance(colour) < 0.5 else "black"


def caption(figure: Figure, *parts: str) -> None:
    """Say where a figure's data come from, small, below; nothing if there is nothing to say."""
    words = "; ".join(part for part in parts if part)
    if words:
        wide = round(figure.get_figwidth() * 18.5)  # characters of this size
        figure.supxlabel(textwrap.fill(words, wide), fontsize=SMALL, color=DARK, x=0.01, ha="left")


def legend(figure: Figure, handles: Iterable[Any], columns: int) -> None:
    """Above all panels, where it covers no data."""
    handles = list(handles)
    figure.legend(handles=handles, loc="outside upper left", ncols=min(columns, len(handles)), columnspacing=1.4)


def key(words: str, face: ColorType, hatch: str = "") -> Patch:
    """An entry of a legend for an area; a hatch is in what is readable on it."""
    return Patch(facecolor=face, edgecolor=ink(face) if hatch else DARK, hatch=hatch, linewidth=0.5, label=words)


def power(value: float) -> str:
    """A power of ten for an axis, as 1e-15: as mathematics its exponent would be smaller than `SMALL`."""
    return (
        f"{value:g}" if 1e-2 <= value < 1e4 else np.format_float_scientific(value, precision=1, trim="-", exp_digits=1)
    )


def note(axes: Axes, place: float, words: str) -> None:
    """Words at the right of a row's panel."""
    axes.annotate(
        words, (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=SMALL, color=DARK
    )  # fmt: skip


def cell(
    axes: Axes, column: int, row: int, words: str, face: ColorType, *, hatch: str = "", bold: bool = False
) -> None:
    """A square of a map with what it says; on a hatch the words have a ground of their own."""
    edge: ColorType = "0.35" if hatch else LINE
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=face, edgecolor=edge, hatch=hatch, linewidth=0.5)
    )
    ground: Any = {"facecolor": face, "edgecolor": "none", "pad": 1} if hatch else None
    weight = "bold" if bold else "normal"
    axes.text(
        column, row, words, ha="center", va="center", fontsize=SMALL + 0.5, color=ink(face), weight=weight, bbox=ground
    )  # fmt: skip


def categories(axes: Axes, names: Iterable[str]) -> None:
    """Names down the y axis, the first on top."""
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def require(frame: pd.DataFrame, *columns: str) -> None:
    """Check that a frame has these columns.

    Raises:
        ValueError: naming those that it lacks.
    """
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(
            f"this figure needs the columns {', '.join(columns)}, and the frame lacks {', '.join(missing)}"
        )
    if not len(frame):
        raise ValueError(f"this figure needs at least one row of {', '.join(columns)}, and the frame has none")


def above_0(frame: pd.DataFrame, *columns: str) -> None:
    """Check that what has a logarithmic axis can be on it; missing columns and missing values can.

    Raises:
        ValueError: naming the first value that cannot.
    """
    for name in (name for name in columns if name in frame):
        if len(wrong := [value for value in frame[name].astype(float) if value <= 0 or value == math.inf]):
            raise ValueError(f"the axis is logarithmic, so that {name} has to be above 0 and finite, not {wrong[0]:g}")


def log_ticks(axes: Axes, low: float, high: float, text: Callable[[float], str], most: int = 8) -> None:
    """Make x logarithmic from low to high, with the densest round ticks of which there are at most so many."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _STEPS:
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= most:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: text(value))
    axes.grid(axis="x")
