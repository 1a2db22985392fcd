"""Numbers of what was measured: name -> text."""

from __future__ import annotations

from typing import Any

from helix.planner.catalogue import model
from paper.report import words
from paper.report.sources import Sources

Numbers = dict[str, str]


def numbers(sources: Sources) -> Numbers:
    """All of them."""
    out: Numbers = {}
    for part in (_parity, _core, _models, _traffic, _beyond, _kv_heads, _smollm2, _training, _concat):
        out |= part(sources)
    return out


def _parity(sources: Sources) -> Numbers:
    found = sources.json("parity")
    worst = found["worst"]
    exact = [row for row in worst if row["schedule"] != "perslice"]
    narrow = [row for row in worst if row["schedule"] == "perslice"]
    far = [row["distance"] for row in found["distances"] if row["slices"] > 1]
    ranks = sorted({row["ranks"] for row in worst})
    return {
        "parity.cases": words.figure(found["cases"]),
        "parity.exact_cases": words.figure(sum(row["cases"] for row in exact if row["dtype"] == "float64")),
        "parity.grids": words.figure(len(found["grids"])),
        "parity.least_ranks": str(ranks[0]),
        "parity.most_ranks": str(ranks[-1]),
        "parity.worst_fp64": words.error(_largest(exact, "float64")),
        "parity.exact_fp32": words.error(_largest(exact, "float32")),
        "parity.perslice_fp64": words.error(_largest(narrow, "float64")),
        "parity.perslice_gradient_fp32": words.error(_largest(narrow, "float32", ("gradient",))),
        "parity.narrowest": str(found["narrowest"]),
        "distance.least": words.fixed(min(far)),
        "distance.most": words.fixed(max(far)),
        "distance.heads": str(found["heads"]),
        "distance.head_dim": str(found["head_dim"]),
        "versions.torch": found["versions"]["torch"].partition("+")[0],
    }


def _largest(rows: list[dict[str, Any]], dtype: str, keys: tuple[str, ...] = ("output", "gradient")) -> float:
    return max(row[key] for row in rows if row["dtype"] == dtype for key in keys)


def fastest(bench: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Of a bench of schedules, the fastest exact one and its speed as a multiple of `perslice`'s."""
    ratios = bench["speed_ratio"]["perslice"]
    name = max(ratios, key=lambda each: ratios[each]["ratio"])
    return name, ratios[name]


def _core(sources: Sources) -> Numbers:
    out: Numbers = {}
    for name in ("core256", "core1024", "core2048", "core4096"):
        bench = sources.json(f"bench_{name}")
        schedule, ratio = fastest(bench)
        out |= {f"{name}.{schedule}": words.ratio(ratio), f"{name}.length": words.figure(bench["settings"]["length"])}
    del out["core256.length"]  # the text has its whole shape
    settings = sources.json("bench_core256")["settings"]
    rounds = sorted(sources.json(f"bench_core{length}")["settings"]["rounds"] for length in (256, 1024, 2048, 4096))
    layer = sources.json("bench_layer")
    model_bench = sources.json("bench_model")["speed_ratio"]["TP16 plain"]
    return out | {
        "core256.shape": f"{settings['batch']} samples of {settings['length']} tokens",
        "core.heads": str(settings["heads"]),
        "core.head_dim": str(settings["head_dim"]),
        "core.rounds": f"{rounds[0]} to {rounds[-1]}",
        "layer.batch": words.ratio(layer["speed_ratio"]["perslice"]["batch"]),
        "model.sliced": words.ratio(model_bench["Helix 4x4"]),
        "model.heads_only": words.ratio(model_bench["Helix 1x16"]),
    }


def _models(sources: Sources) -> Numbers:
    dense, moe = sources.json("baselines_dense"), sources.json("baselines_moe")
    sent = dense["comm_bytes_per_rank_per_step"]["executed"]
    inside = sum(count for key, count in sent.items() if key.rpartition(".")[2] not in ("enter", "leave"))
    return {
        "dense.error": words.error(dense["accuracy"]["relative_error"]),
        "moe.error": words.error(moe["accuracy"]["relative_error"]),
        "dense.bytes": words.size(sum(sent.values())),
        "dense.stream_share": words.percent(1 - inside / sum(sent.values())),
        "dense.inside_share": words.percent(inside / sum(sent.values())),
        "dense.ranks": str(dense["world_size"]),
        "dense.layers": str(dense["model"]["layers"]),
        "dense.width": str(dense["model"]["width"]),
        "dense.batch": str(dense["workload"]["batch_size"]),
        "dense.length": str(dense["workload"]["seq_len"]),
        "dense.runs": str(dense["workload"]["runs"]),
        "dense.weights": words.size(dense["memory_bytes_per_rank"]["weights"]),
        "interval.level": words.percent(0.95),  # of every report's ci95
    }


def traffic(sources: Sources) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes counted and predicted of the dense model's methods, by name."""
    dense, peers = sources.json("baselines_dense"), sources.json("outside_peers_dense")
    found = {each["method"]["name"]: each for each in (dense, *dense["baselines"], *peers["baselines"])}
    names = ("helix_4x4", "tp16", "tp8_pp2", "ulysses16", "dp16")
    return {name: found[name]["comm_bytes_per_rank_per_step"] for name in names}


def _traffic(sources: Sources) -> Numbers:
    sent = {name: words.size(sum(found["executed"].values())) for name, found in traffic(sources).items()}
    return {"tp16.bytes": sent["tp16"], "tp8_pp2.bytes": sent["tp8_pp2"], "ulysses.bytes": sent["ulysses16"]}


def _kv_heads(sources: Sources) -> Numbers:
    found = sources.json("beyond_kv_heads")
    against = {each["method"]["name"]: each["paired"] for each in found["baselines"] if "error" not in each}
    return {
        "kv.heads": str(found["model"]["heads"]),
        "kv.kv_heads": str(found["model"]["kv_heads"]),
        "kv.ranks": str(found["world_size"]),
        "kv.pipeline": words.ratio(against["tp3_pp4"]),
        "kv.replicas": words.ratio(against["tp3_dp4"]),
        "kv.autotp": words.ratio(against["autotp12"]),
    }


def _beyond(sources: Sources) -> Numbers:
    found = sources.json("devices_beyond_heads")
    own = found["memory_bytes_per_rank"]["weights"]
    (autotp,) = (each for each in found["baselines"] if each["method"]["name"] == "autotp16")
    return {
        "beyond.heads": str(found["model"]["heads"]),
        "beyond.ranks": str(found["world_size"]),
        "beyond.weights": words.size(own),
        "beyond.error": words.error(found["accuracy"]["relative_error"]),
        "beyond.autotp_share": words.fixed(autotp["memory_bytes_per_rank"]["weights"] / own, 1),
    }


def smollm2_runs(sources: Sources) -> dict[int, dict[str, Any]]:
    """Reports by their ranks."""
    names = ("smollm2_hf_tp3", "smollm2_hf_tp4", "smollm2_helix_4x3", "smollm2_hf_tp16")
    return {report["world_size"]: report for report in map(sources.json, names)}


def _smollm2(sources: Sources) -> Numbers:
    runs = smollm2_runs(sources)
    main, three = sources.json("smollm2_helix_4x3"), sources.json("smollm2_hf_tp3")
    against = {each["method"]["name"]: each["paired"] for each in three["baselines"]}
    (gloo,) = sources.json("smollm2_hf_tp3_gloo")["baselines"]
    shape = model("smollm2")
    ranks = [str(count) for count in sorted(runs)]
    return {
        "smollm2.heads": str(shape.heads),
        "smollm2.kv_heads": str(shape.kv_heads),
        "smollm2.parameters": f"{_parameters(main):,.0f}{words.SPACE}million",
        "smollm2.ranks": str(main["world_size"]),
        "smollm2.ranks_list": words.listed(ranks),
        "smollm2.grids_ranks": words.listed(ranks),
        "smollm2.logits": words.error(max(run["accuracy"]["relative_error"] for run in runs.values())),
        "smollm2.rate": words.summary(main["tokens_per_s"]),
        "smollm2.step_bytes": words.size(sum(main["comm_bytes_per_rank_per_step"]["executed"].values())),
        "smollm2.collectives": str(main["collectives"]["per_step"]),
        "smollm2.comm_share": words.percent(main["collectives"]["share_of_step"]["mean"]),
        "smollm2.against_tp3": words.ratio(against["hf_tp3"]),
        "smollm2.against_single": words.ratio(against["single"]),
        "smollm2.gloo": words.ratio(gloo["paired"]),
    }


def _parameters(report: dict[str, Any]) -> float:
    """Millions, by the closed form of the model's dims."""
    dims = report["model"]
    width, heads = dims["width"], dims["heads"] + dims["kv_heads"]
    layer = 2 * heads * dims["head_dim"] * width + 3 * width * dims["mlp_hidden"] + 2 * width
    return float(dims["layers"] * layer + (dims["vocab"] + 1) * width) / 1e6


def _training(sources: Sources) -> Numbers:
    grids, exact = sources.table("training_grids"), sources.table("training_exact_or_perslice")
    scaling, scaled = sources.table("training_scaling"), sources.table("training_scaling_runs")
    runs = sources.table("training_exact_or_perslice_runs")
    both = exact.set_index("setting")
    main, narrow = both.loc["helix_2x2"], both.loc["helix_2x2_perslice"]
    speed = runs.pivot(index="seed", columns="schedule", values="tokens_per_s")
    compared = scaling[scaling["pairs"] > 0].set_index("setting")
    wide = compared.index.str.startswith("helix_4x2")
    quiet = compared[~wide]
    skipped = scaled[scaled["label"].str.startswith("helix_4x2") & scaled["label"].str.contains("adaptive")]
    return {
        "grids.steps": str(sources.table("training_grids_runs")["steps"].max()),
        "grids.ways": str(grids["setting"].str.split().str[0][grids["pairs"] > 0].nunique()),
        "grids.loss_gap": words.error(grids["loss_gap"].max()),
        "training.steps": str(runs["steps"].max()),
        "training.seeds": str(int(narrow["pairs"])),
        "training.exact": _with_interval(main, "validation_bpb"),
        "training.perslice": _with_interval(narrow, "validation_bpb"),
        "training.difference": _with_interval(narrow, "difference"),
        "training.speed": words.fixed((speed["perslice"] / speed["batch"]).mean()),
        "scaling.quiet": words.error(quiet["difference"].abs().max()),
        "scaling.quiet_grids": words.listed([f"`{name.split()[0]}`" for name in quiet.index]),
        "scaling.skipped": str(int(skipped["skipped_steps"].sum())),
    }


def _with_interval(row: Any, name: str) -> str:
    return f"{words.fixed(row[name], 3)}{words.SPACE}{words.interval(row[f'{name}_low'], row[f'{name}_high'], 3)}"


def _concat(sources: Sources) -> Numbers:
    found = sources.json("bench_concat")
    sent = found["executed_bytes_per_rank_per_step"]
    total = sum(sent["hierarchical"].values())
    return {
        "concat.bytes": words.size(total),
        "concat.across_share": words.percent(sent["hierarchical"]["all_gather/attention.concat_heads"] / total),
        "concat.ratio": words.ratio(found["speed_ratio"]["flat"]["hierarchical"]),
    }
