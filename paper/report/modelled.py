"""Numbers of what was modelled, of its error, and of the claims: name -> text."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import kendalltau

from helix.claims.ledger import VERDICTS
from helix.claims.resolve import found
from helix.claims.table import counts
from helix.config.schema import ITEMSIZE
from helix.partition.cost import AttentionCost
from helix.partition.grid import Grid, HeadLayout
from helix.partition.schedules import EXACT
from helix.planner import catalogue
from helix.planner.papers import LENGTH, PRECISION, RANKS
from paper.report import words
from paper.report.measured import Numbers
from paper.report.sources import Sources

WIDE = 256  # features of a head from which it counts as wide: more than fused kernels of GPUs take
DECODE_WIDTHS = ("generate", "features of a head")  # mode and axis of a map


def numbers(sources: Sources) -> Numbers:
    """All of them."""
    out: Numbers = {}
    for part in (_validate, _published, _papers, _maps, _known, _search, _accuracy, _claims):
        out |= part(sources)
    return out


def _validate(sources: Sources) -> Numbers:
    found = sources.json("validate")
    outcomes = found["outcomes"]
    others = [one for one in outcomes if not one["layout"].startswith("tp")]
    ranks = sorted({one["ranks"] for one in outcomes})
    return {
        "validate.layouts": str(len(outcomes)),
        "validate.cases": str(len(found["choices"])),
        "validate.ranks": words.listed([str(count) for count in ranks]),
        "validate.error": words.percent(found["median_error"]),
        "validate.tau": words.fixed(found["kendall_tau"]),
        "validate.tau_within": words.fixed(found["kendall_tau_within_cases"]),
        "validate.memory_error": words.percent(found["median_memory_error"]),
        "validate.estimate_error": words.percent(found["median_memory_estimate_error"]),
        "validate.good": str(round(found["good_choices"] * len(found["choices"]))),
        "validate.without_tp_layouts": str(len(others)),
        "validate.without_tp_tau": words.fixed(_tau(others)),
        "validate.without_tp_error": words.percent(_median_error(others)),
    }


def _tau(outcomes: list[dict[str, Any]]) -> float:
    return float(kendalltau([one["predicted_ms"] for one in outcomes], [one["measured_ms"] for one in outcomes])[0])


def _median_error(outcomes: list[dict[str, Any]]) -> float:
    return float(np.median([abs(one["predicted_ms"] / one["measured_ms"] - 1) for one in outcomes]))


def _published(sources: Sources) -> Numbers:
    low, high = sources.json("plan_papers")["settings"][0]["reached_in_published_tables"]
    return {"published.reached_low": words.fixed(low), "published.reached_high": words.fixed(high)}


def modelled(setting: dict[str, Any], name: str, schedule: str | None = None) -> dict[str, Any]:
    """A layout's row of `plan --papers`; without a schedule, the fastest exact one of a grid."""
    rows = [row for row in setting["rivals"] + setting["grids"] if row["name"] == name]
    if schedule is None:
        rows = [row for row in rows if row["schedule"] != "perslice"]
    else:
        rows = [row for row in rows if row["schedule"] == schedule]
    return max(rows, key=lambda row: float(row["tokens_per_s"]))


def _papers(sources: Sources) -> Numbers:
    settings = {setting["model"]: setting for setting in sources.json("plan_papers")["settings"]}
    main, dense = settings["paper_dense_16l"], [each for name, each in settings.items() if "dense" in name]
    base, proposed = main["tokens_per_s"]
    before, after = main["ms_per_token"]
    narrow = modelled(main, "helix_4x4", "perslice")
    total = sum(narrow["seconds"].values())
    speeds = [modelled(setting, "helix_4x4", "perslice")["tokens_per_s"] for setting in dense]
    shape = catalogue.shape(catalogue.model("paper_dense_16l"), "forward")
    layer = {name: _layer_bytes(shape.layout, name, main["batch"]) for name in ("score", "batch")}
    return {
        "papers.claimed_gain": words.percent(proposed / base - 1, 1),
        "papers.claimed_overhead": words.percent(1 - after / before, 1),
        "papers.gpus": str(RANKS),
        "papers.heads": str(shape.heads),
        "papers.head_dim": str(shape.head_dim),
        "papers.batch": str(main["batch"]),
        "papers.length": words.figure(LENGTH),
        "papers.score_bytes": words.size(layer["score"]),
        "papers.batch_bytes": words.size(layer["batch"]),
        "papers.spread": f"a factor of {words.fixed(max(speeds) / min(speeds), 1)}",
        "papers.perslice_share": words.fixed(narrow["tokens_per_s"] / proposed),
        "papers.exchange_share": words.percent(narrow["seconds"]["exchange"] / total),
        "papers.parameters": f"{words.fixed(shape.parameters() / 1e9, 1)}{words.SPACE}billion",
        "papers.tpot_times": words.figure(after * 1e-3 * proposed, 2),
    }


def _layer_bytes(layout: HeadLayout, schedule: str, batch: int) -> int:
    cost = AttentionCost(layout, Grid(4, 4), schedule, batch, LENGTH, causal=True, itemsize=ITEMSIZE[PRECISION])
    return sum(cost.bytes().values())


def _maps(sources: Sources) -> Numbers:
    maps = {mode: sources.json(f"plan_map_{mode}") for mode in ("forward", "train", "generate")}
    cells = [
        (mode, panel["x"], cell)
        for mode, content in maps.items()
        for panel in content["map"]
        for cell in panel["cells"]
    ]
    ratios = [cell["ratio"] for _, _, cell in cells if cell["ratio"] is not None]
    only = [cell for _, _, cell in cells if cell["sliced"] and not cell["rival"]]
    wins = [(mode, x, cell) for mode, x, cell in cells if (cell["ratio"] or 0) > 1.005]
    widths = [(int(cell["x"]), cell["ratio"]) for mode, x, cell in wins if (mode, x) == DECODE_WIDTHS]
    wide = [ratio for features, ratio in widths if features >= WIDE]
    return {
        "map.devices": str(maps["generate"]["devices"]),
        "map.places": str(len(ratios)),
        "map.least": words.fixed(min(ratios)),
        "map.most": words.fixed(max(ratios)),
        "map.wins": str(len(wins)),
        "map.only": str(len(only)),
        "map.wins_wide": str(len(wide)),
        "map.wide_from": str(WIDE),
        "map.decode_wide_most": words.fixed(max(wide)),
    }


def _known(sources: Sources) -> Numbers:
    decode, train = (sources.json(f"plan_known_{mode}")["rows"] for mode in ("generate", "train"))
    works = {
        name: next(row["work"] for row in rows if row["work"]) for name, rows in (("decode", decode), ("train", train))
    }
    out: Numbers = {}
    for name, work in works.items():
        out |= {f"known.{name}_batch": str(work["batch"]), f"known.{name}_length": words.figure(work["length"])}
    planned = {row["model"] for row in decode if row["ratio"]}
    devices = sorted({row["devices"] for row in decode if row["ratio"]})
    return out | {
        "known.models": str(len(planned)),
        "known.devices": words.listed([str(count) for count in devices]),
        "known.header": "|".join(f"{title} {count}" for title, _, count in known_columns(sources)),
    }


def known_columns(sources: Sources) -> list[tuple[str, str, int]]:
    """Title, mode and devices: in each mode the fewest and the most devices on which all models fit."""
    out = []
    for title, mode in (("decode", "generate"), ("train", "train")):
        rows = [row for row in sources.json(f"plan_known_{mode}")["rows"] if row["model"] != "deepseek_v3"]
        lacking = {row["devices"] for row in rows if not row["ratio"]}
        counts = sorted({row["devices"] for row in rows} - lacking)
        out += [(title, mode, counts[0]), (title, mode, counts[-1])]
    return out


def _search(sources: Sources) -> Numbers:
    searches = sources.json("plan_search_growth")["searches"]
    most = max(row["devices"] for row in searches)
    slowest = {
        devices: max(row["processor_s"]["median"] for row in searches if row["devices"] == devices)
        for devices in (1024, most)
    }
    return {
        "search.thousand_devices": words.figure(1024),
        "search.thousand": f"{words.fixed(slowest[1024], 1)}{words.SPACE}s",
        "search.most_devices": words.figure(most),
        "search.most": f"{words.fixed(slowest[most], 1)}{words.SPACE}s",
    }


def _accuracy(sources: Sources) -> Numbers:
    claim = sources.ledger["full-accuracy"]
    assert claim.value is not None
    ours = {each.label: each.value for each in found(sources.ledger, claim)}
    return {
        "papers.accuracy": words.percent(claim.value.figure, 1),
        "accuracy.formula": words.percent(ours["papers' formula"]),
        "accuracy.single": words.percent(ours["one device in FP16"], 2),
        "schedules.exact": words.spelled(len(EXACT)),
    }


def _claims(sources: Sources) -> Numbers:
    verdicts = counts(sources.ledger)
    names = ("reproduced", "not_reproduced", "inconsistent", "not_testable")
    return {"claims.all": str(verdicts["all"]["all"])} | {
        f"claims.{name}": str(verdicts[verdict]["all"]) for name, verdict in zip(names, VERDICTS, strict=True)
    }
