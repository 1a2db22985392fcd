"""The report's tables: name -> rows of cells. A cell in backquotes is code, one in dollars mathematics."""

from __future__ import annotations

from typing import Any

import pandas as pd

from helix.claims.ledger import VERDICTS
from helix.claims.table import Row, counts, hardest, rows, telling
from helix.partition.grid import HeadLayout, legal_grids
from paper.report import formulas, words
from paper.report.errors import ReportError
from paper.report.measured import smollm2_runs
from paper.report.modelled import known_columns, modelled
from paper.report.sources import Sources

Rows = list[list[str]]
DASH = "\u2013"


def tables(sources: Sources) -> dict[str, Rows]:
    """All of them."""
    return {
        "distance": _distance(sources),
        "schedules": formulas.rows(),
        "parity": _parity(sources),
        "smollm2": _smollm2(sources),
        "published": _published(sources),
        "baselines": _baselines(sources),
        "beyond": _beyond(sources),
        "scaling": _scaling(sources),
        "papers": _papers(sources),
        "known": _known(sources),
        "claim_counts": _claim_counts(sources),
        "telling": [_telling(row) for row in telling(sources.ledger)],
        "claims": [_claim(row) for row in rows(sources.ledger)],
        "hardest": [[row.paper, _said(row), row.verdict, words.typeset(row.hard)] for row in hardest(sources.ledger)],
    }


def headers(sources: Sources) -> dict[str, str]:
    """Heads of columns that are numbers, joined by a bar."""
    lengths = dict.fromkeys(row["length"] for row in sources.json("parity")["distances"])
    return {"distance.header": "|".join(f"$L = {length}$" for length in lengths)}


def _distance(sources: Sources) -> Rows:
    frame = pd.DataFrame(sources.json("parity")["distances"])
    wide = frame[frame["slices"] > 1].pivot(index="slices", columns="length", values="distance")
    return [
        [str(m), *(words.fixed(value) for value in row)] for m, row in zip(wide.index, wide.to_numpy(), strict=True)
    ]


def _parity(sources: Sources) -> Rows:
    frame = pd.DataFrame(sources.json("parity")["worst"])
    out = []
    for schedule, own in frame.groupby("schedule", sort=False):
        worst = own.groupby("dtype")[["output", "gradient"]].max()
        errors = [worst.loc[dtype, kind] for dtype in ("float32", "float64") for kind in ("output", "gradient")]
        out.append([f"`{schedule}`", str(own["cases"].sum()), *map(words.error, errors)])
    return out


def _smollm2(sources: Sources) -> Rows:
    runs = smollm2_runs(sources)
    dims = sources.json("smollm2_helix_4x3")["model"]
    layout = HeadLayout(dims["heads"], dims["kv_heads"], dims["head_dim"], rope=True)
    out = []
    for ranks in sorted({*runs, layout.heads}):
        if ranks not in runs:  # as many ranks as heads: no grid divides it
            out.append([str(ranks), _refused(layout, ranks), DASH, DASH, DASH])
            continue
        run = runs[ranks]
        weights = words.size(run["memory_bytes_per_rank"]["weights"])
        (tp,) = _tensor_parallel(sources, ranks)
        out.append([str(ranks), f"`{run['method']['name']}`", weights, "all", _fate(tp)])
    return out


def _refused(layout: HeadLayout, ranks: int) -> str:
    if legal_grids(layout, ranks):
        raise ReportError(f"SmolLM2 has a grid of {ranks} ranks, and no stored run on it")
    return "no grid divides it"


def _tensor_parallel(sources: Sources, ranks: int) -> list[dict[str, Any]]:
    report = sources.json(f"smollm2_hf_tp{ranks}")
    return [each for each in report["baselines"] if each["method"]["name"] == f"hf_tp{ranks}"]


def _fate(baseline: dict[str, Any]) -> str:
    return "fails: " + _short(baseline["error"]) if "error" in baseline else "runs"


def _short(error: str) -> str:
    """An error without its class, as long as a cell has room for."""
    kind, _, words_ = error.partition(": ")
    text = words_ if kind.endswith("Error") else error
    return text if len(text) <= 110 else text[:107].rsplit(" ", 1)[0] + "\u2026"


def _published(sources: Sources) -> Rows:
    out = []
    for table in sources.json("plan_published")["tables"]:
        who = table["source"].partition(",")[0] + " " + table["name"].rpartition("_")[2]
        errors = [row["error"] for row in table["rows"]]
        out.append([who, str(len(errors)), _range(errors), words.percent(table["median_error"])])
        known = [row["calculon"] / row["measured"] - 1 for row in table["rows"] if row["calculon"]]
        if known:
            median = float(pd.Series(known).abs().median())
            out.append(["the same by Calculon", str(len(known)), _range(known), words.percent(median)])
    return out


def _range(errors: list[float]) -> str:
    low, high = (words.fixed(100 * value, 0) for value in (min(errors), max(errors)))
    return f"{low} to {high}{words.SPACE}%".replace("-", "\u2212")


_METHODS = {
    "tp8_pp2": "tensor parallelism, two stages",
    "tp16": "PyTorch tensor parallelism",
    "tp16_sp": "the same, stream cut",
    "hf_tp16": "transformers' plan",
    "autotp16": "DeepSpeed AutoTP",
    "ulysses16": "DeepSpeed-Ulysses",
    "dp16": "data parallelism",
}


def _baselines(sources: Sources) -> Rows:
    dense, moe = (
        {
            each["method"]["name"]: each
            for part in ("baselines", "outside_peers")
            for each in sources.json(f"{part}_{kind}")["baselines"]
        }
        for kind in ("dense", "moe")
    )
    out = []
    for name, title in _METHODS.items():
        ratios = [words.ratio(found[name]["paired"]) if name in found else DASH for found in (dense, moe)]
        out.append([f"{title}", *ratios, words.size(dense[name]["memory_bytes_per_rank"]["weights"])])
    return out


def _beyond(sources: Sources) -> Rows:
    out = []
    for each in sources.json("devices_beyond_heads")["baselines"]:
        name = f"`{each['method']['name']}`"
        if "error" in each:
            out.append([name, words.breakable(_short(each["error"])), DASH])
        else:
            out.append([name, words.ratio(each["paired"]), words.size(each["memory_bytes_per_rank"]["weights"])])
    return out


def _scaling(sources: Sources) -> Rows:
    strong, weak = (_by_ranks(sources.table(f"{kind}_scaling_baselines")) for kind in ("strong", "weak"))
    out = []
    for ranks, fixed in strong.items():
        grown = weak.get(ranks, [])
        for place, (name, ratio) in enumerate(fixed):
            other = grown[place] if place < len(grown) else ("", "")
            first = str(ranks) if place == 0 else ""
            out.append([first, f"`{name}`", ratio, f"`{other[0]}`" if other[0] else "", other[1]])
    return out


def _by_ranks(frame: pd.DataFrame) -> dict[int, list[tuple[str, str]]]:
    out: dict[int, list[tuple[str, str]]] = {}
    for row in frame.to_dict("records"):
        m, n = row["label"].removeprefix("helix_").split("x")
        paired = {"ratio": row["ratio"], "ci95": (row["ratio_low"], row["ratio_high"])}
        out.setdefault(int(m) * int(n), []).append((row["label"], words.ratio(paired)))
    return out


def _papers(sources: Sources) -> Rows:
    out = []
    for setting in sources.json("plan_papers")["settings"]:
        found = [
            modelled(setting, name)["tokens_per_s"] for name in ("tp8_pp2", "tp16", "dp16", "helix_1x16", "helix_4x4")
        ]
        values = [*setting["tokens_per_s"], *found, setting["arithmetic_at_peak_tokens_per_s"]]
        kind, layers = setting["model"].removeprefix("paper_").split("_")
        name = f"{layers.removesuffix('l')} layers{', experts' if kind == 'moe' else ''}, {setting['batch']:,}"
        out.append([name, *(words.figure(value / 1e6) for value in values)])
    return out


def _known(sources: Sources) -> Rows:
    found = {
        (mode, row["model"], row["devices"]): row["ratio"]
        for mode in ("generate", "train")
        for row in sources.json(f"plan_known_{mode}")["rows"]
    }
    names = dict.fromkeys(name for (_, name, _), ratio in found.items() if ratio)
    columns = known_columns(sources)
    return [[f"`{name}`", *(words.fixed(found[mode, name, count]) for _, mode, count in columns)] for name in names]


def _claim_counts(sources: Sources) -> Rows:
    found = counts(sources.ledger)
    columns = ("full", "concise", "keypoints", "all")
    return [[verdict, *(str(found[verdict].get(column, 0)) for column in columns)] for verdict in (*VERDICTS, "all")]


def _said(row: Row) -> str:
    """Words of a manuscript in quotation marks; cells and formulas, which are no quotation, with a word on it."""
    return f"\u201c{row.quote}\u201d" if row.quoted == f'"{row.quote}"' else row.quoted


def _telling(row: Row) -> list[str]:
    return [_said(row), row.verdict, words.typeset(row.arithmetic or row.ours or row.why)]


def _claim(row: Row) -> list[str]:
    where = f"{row.paper}: {row.section}"
    evidence = (part.removeprefix("paper/results/").removeprefix("tests/") for part in row.evidence)
    shown = "; ".join(part for part in (row.arithmetic, *evidence) if part)
    return [where, _said(row), row.verdict, words.typeset(row.ours or row.why), words.breakable(words.typeset(shown))]
