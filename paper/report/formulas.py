"""The schedules' closed forms, typeset and evaluated side by side, so that the table cannot differ from the library.

The library's own forms (`helix.partition.cost`) also cover shares that do not divide evenly; these are what they come
to where they do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from helix.partition.cost import AttentionCost
from helix.partition.decoding import GenerationCost
from helix.partition.families import PretrainedShape
from helix.partition.grid import Grid, HeadLayout
from helix.partition.phases import Phases
from helix.partition.schedules import EXACT, SCHEDULES
from paper.report.errors import ReportError


@dataclass(frozen=True)
class Dims:
    """m slices; h and k query and key/value heads of a group; d features; B samples of L tokens; s bytes a number."""

    m: int
    h: int
    k: int
    d: int
    B: int
    L: int
    s: int

    @property
    def N(self) -> int:
        return self.B * self.L

    @property
    def pairs(self) -> int:
        return self.L * (self.L + 1) // 2


@dataclass(frozen=True)
class Form:
    """A formula in typst's mathematics, and the same in Python."""

    math: str
    value: Callable[[Dims], float]


@dataclass(frozen=True)
class Row:
    """A schedule's row: what moves and what it needs in words, bytes and FLOPs as formulas."""

    moves: str
    needs: str
    bytes: Form
    flops: Form


_DEALT = Form("2 (m - 1) / m^2 N d (h_g + k_g) s", lambda x: 2 * (x.m - 1) / x.m**2 * x.N * x.d * (x.h + x.k) * x.s)
_SHARED = Form("4 h_g B P d \\/ m", lambda x: 4 * x.h * x.B * x.pairs * x.d / x.m)
ROWS = {
    "batch": Row("all-to-all of Q, K, V: features to samples; of O back", "a sample for each device", _DEALT, _SHARED),
    "heads": Row("all-to-all of Q, K, V: features to heads; of O back", "$m | h_g$ and $m | k_g$", _DEALT, _SHARED),
    "rows": Row(
        "all-to-all of Q: features to query rows; all-gather of K, V; all-to-all of O back",
        "a query row for each device",
        Form(
            "2 (m - 1) / m^2 N d (h_g + m k_g) s",
            lambda x: 2 * (x.m - 1) / x.m**2 * x.N * x.d * (x.h + x.m * x.k) * x.s,
        ),
        _SHARED,
    ),
    "gather": Row(
        "all-gather of Q and K; V and O stay sliced",
        "\u2013",
        Form("(m - 1) / m N d (h_g + k_g) s", lambda x: (x.m - 1) / x.m * x.N * x.d * (x.h + x.k) * x.s),
        Form("2 h_g B P d (1 + 1 \\/ m)", lambda x: 2 * x.h * x.B * x.pairs * x.d * (1 + 1 / x.m)),
    ),
    "score": Row(
        "all-reduce of the partial scores",
        "\u2013",
        Form("2 (m - 1) / m h_g B L^2 s'", lambda x: 2 * (x.m - 1) / x.m * x.h * x.B * x.L**2 * max(x.s, 4)),
        Form("4 h_g B L^2 d \\/ m", lambda x: 4 * x.h * x.B * x.L**2 * x.d / x.m),
    ),
    "perslice": Row("nothing", "\u2013", Form("0", lambda x: 0), _SHARED),
}
# Of t = L new tokens of each of B samples, one layer, within the m-group.
KVSEQ = Form(
    "(m - 1) B t [(h_g + 2 k_g) d / m s + h_g (d / m + 1) s']",
    lambda x: (x.m - 1) * x.N * ((x.h + 2 * x.k) * x.d / x.m * x.s + x.h * (x.d / x.m + 1) * max(x.s, 4)),
)
# Shares divide evenly in all of these: B, L / 2 and the group's heads by m.
_TRIED = (Dims(2, 4, 2, 16, 2, 12, 4), Dims(4, 8, 4, 32, 8, 24, 2), Dims(4, 4, 4, 8, 4, 16, 8))


def rows() -> list[list[str]]:
    """Of the report's table, each formula held against the library first.

    Raises:
        ReportError: if a formula or a schedule differs.
    """
    if set(ROWS) != set(SCHEDULES):
        raise ReportError(f"the table of schedules has {', '.join(ROWS)}, and the library {', '.join(SCHEDULES)}")
    for name in ROWS:
        check(name)
    return [
        [f"`{name}`", row.moves, row.needs, f"${row.bytes.math}$", f"${row.flops.math}$", _exact(name)]
        for name, row in ROWS.items()
    ]


def equations() -> dict[str, str]:
    """Formulas that stand in the text by themselves, each held against the library first.

    Raises:
        ReportError: if one differs.
    """
    for x in _TRIED:
        shape = PretrainedShape("llama", 1, x.h * x.d, x.h, x.k, x.d, 1, 1, 1)
        sent = GenerationCost(shape, Grid(x.m, 1), Phases("rows", "kvseq"), x.B, x.s).step_bytes(x.L)
        _agree("kvseq's bytes", KVSEQ, x, sent["all_gather/attention.qkv"] + sent["all_to_all/attention.merge"])
    return {"kvseq": KVSEQ.math}


def check(name: str) -> None:
    for x in _TRIED:
        cost = AttentionCost(HeadLayout(x.h, x.k, x.d), Grid(x.m, 1), name, x.B, x.L, causal=True, itemsize=x.s)
        _agree(f"{name}'s bytes", ROWS[name].bytes, x, sum(cost.bytes().values()))
        _agree(f"{name}'s FLOPs", ROWS[name].flops, x, cost.core_flops())


def _agree(what: str, form: Form, x: Dims, true: int) -> None:
    if abs(form.value(x) - true) > 1e-9 * max(1, true):
        raise ReportError(f"the formula of {what} gives {form.value(x):g} for {x}, the library {true}")


def _exact(name: str) -> str:
    return "yes" if name in EXACT else "no"
