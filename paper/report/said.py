"""What the text says of results in words, each with the condition under which it may.

A run that contradicts a sentence stops the build, as a missing number does.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from paper.report.errors import ReportError
from paper.report.measured import fastest, smollm2_runs
from paper.report.modelled import modelled
from paper.report.sources import Sources

Said = Iterator[tuple[str, bool]]
PARTITIONED = ("tp8_pp2", "tp16", "tp16_sp", "autotp16", "hf_tp16")  # of @baselines: no rank holds the whole model
WHOLE = ("ulysses16", "dp16")


def check(sources: Sources) -> None:
    """Hold every sentence against the results.

    Raises:
        ReportError: with the first sentence that no longer holds.
    """
    for part in (_parity, _schedules, _models, _beyond, _smollm2, _training, _validate, _papers, _known):
        for sentence, holds in part(sources):
            if not holds:
                raise ReportError(f"the text says what the results no longer show: {sentence}")


def _parity(sources: Sources) -> Said:
    found = sources.json("parity")
    yield "all bytes agree", found["bytes_agree"]
    exact = [row for row in found["worst"] if row["schedule"] != "perslice" and row["dtype"] == "float64"]
    yield "in FP64 the errors are a few roundings", all(row["output"] + row["gradient"] < 1e-14 for row in exact)
    narrow = [row for row in found["worst"] if row["schedule"] == "perslice" and row["dtype"] == "float32"]
    worst = max(narrow, key=lambda row: float(row["gradient"]))
    yield "the largest error of per-slice attention is on helix_16x1, under QK-norm", worst["grid"] == "helix_16x1"
    yield "the largest error of per-slice attention is on helix_16x1, under QK-norm", worst["qk_norm"]
    distances = {(row["slices"], row["length"]): row["distance"] for row in found["distances"]}
    ordered = all(
        distances[m, length] <= min(distances.get((2 * m, length), 9), distances.get((m, 4 * length), 9))
        for m, length in distances
    )
    yield "the more slices and the longer the sequence, the further is per-slice attention", ordered
    concat = sources.json("bench_concat")["executed_bytes_per_rank_per_step"]
    same = sum(concat["hierarchical"].values()) == sum(concat["flat"].values())
    yield "hierarchical and flat concatenation send the same bytes", same


def _schedules(sources: Sources) -> Said:
    benches = {length: sources.json(f"bench_core{length}") for length in (256, 1024, 2048, 4096)}
    yield "the fastest exact schedule on four samples is batch", fastest(benches[256])[0] == "batch"
    yield (
        "the fastest exact one with one sample is heads",
        all(fastest(benches[n])[0] == "heads" for n in (1024, 2048, 4096)),
    )
    yield "exact attention is slower on short sequences", fastest(benches[256])[1]["ci95"][1] < 1
    yield "and faster on long ones", all(fastest(benches[length])[1]["ci95"][0] > 1 for length in (2048, 4096))
    losing = [
        found["ci95"][1]
        for bench in benches.values()
        for name, found in bench["speed_ratio"]["perslice"].items()
        if name in ("score", "gather")
    ]
    yield "score and gather lose wherever they ran", max(losing) < 1
    yield (
        "over the whole layer no difference could be told",
        _is_tie(sources.json("bench_layer")["speed_ratio"]["perslice"]["batch"]),
    )
    concat = sources.json("bench_concat")["speed_ratio"]["flat"]["hierarchical"]
    yield "that the hierarchy saves anything is not reproduced", concat["ci95"][0] < 1


def _models(sources: Sources) -> Said:
    for kind in ("dense", "moe"):
        main = sources.json(f"baselines_{kind}")
        sent = main["comm_bytes_per_rank_per_step"]
        yield f"what the {kind} model sends is as predicted", sent["executed"] == sent["predicted"]
        rivals = main["baselines"] + sources.json(f"outside_peers_{kind}")["baselines"]
        found = {each["method"]["name"]: each["paired"]["ci95"] for each in rivals if "error" not in each}
        ahead = all(found[name][0] > 1 for name in PARTITIONED if name in found)
        yield f"Helix is ahead of what also partitions the weights ({kind})", ahead
        behind = all(found[name][1] < 1 for name in WHOLE)
        yield f"Helix is behind what holds the whole model on every rank ({kind})", behind
    alone = sources.json("bench_model")["speed_ratio"]["Helix 1x16"]["Helix 4x4"]
    yield "helix_1x16, which slices nothing, is as fast as helix_4x4", _is_tie(alone)


def _beyond(sources: Sources) -> Said:
    rivals = {each["method"]["name"]: each for each in sources.json("devices_beyond_heads")["baselines"]}
    refused = {name for name, each in rivals.items() if "error" in each}
    yield (
        "beyond the heads these do not run: tp16, ulysses16, cp16, hf_tp16",
        refused == {"tp16", "ulysses16", "cp16", "hf_tp16"},
    )
    mixed = all(rivals[name]["paired"]["ci95"][1] < 1 for name in ("tp4_dp4", "tp4_pp4"))
    yield "mixed layouts are faster beyond the heads", mixed


def _smollm2(sources: Sources) -> Said:
    runs = smollm2_runs(sources)
    yield "every token is the single process's", all(run["accuracy"]["tokens_equal"] for run in runs.values())
    traffic = [run[key] for run in runs.values() for key in ("comm_bytes_per_rank_per_step", "prefill_bytes_per_rank")]
    yield "SmolLM2's bytes equal the closed forms", all(each["executed"] == each["predicted"] for each in traffic)
    (gloo,) = sources.json("smollm2_hf_tp3_gloo")["baselines"]
    yield "without shared memory the gain over tensor parallelism is gone", _is_tie(gloo["paired"])


def _training(sources: Sources) -> Said:
    runs = sources.table("training_exact_or_perslice_runs")
    by_seed = runs.pivot(index="seed", columns="schedule", values="validation_bpb")
    yield "per-slice is worse at each seed", bool((by_seed["perslice"] > by_seed["batch"]).all())
    both = sources.table("training_exact_or_perslice").set_index("setting")
    yield "per-slice is worse beyond the interval", both.loc["helix_2x2_perslice"]["difference_low"] > 0
    scaled = sources.table("training_scaling_runs")
    quiet = scaled[~scaled["label"].str.startswith("helix_4x2")]
    yield "adaptive scaling skips no step but on helix_4x2", not quiet["skipped_steps"].any()


def _validate(sources: Sources) -> Said:
    found = sources.json("validate")
    yield "all bytes of the validated layouts agree", found["bytes_agree"]
    parts = [(one["layout"].startswith("tp"), one["predicted_ms"] / one["measured_ms"]) for one in found["outcomes"]]
    off = [median(abs(part - 1) for tensor, part in parts if tensor is which) for which in (True, False)]
    yield "tensor parallelism is not much further off than the rest", off[0] < 2 * off[1]
    rows = [row for table in sources.json("plan_published")["tables"] for row in table["rows"]]
    too_fast = all((row["error"] > 0) == row["is_speed"] for row in rows)
    yield "against published tables the model is too fast everywhere", too_fast


def _papers(sources: Sources) -> Said:
    settings = {setting["model"]: setting for setting in sources.json("plan_papers")["settings"]}
    dense = [setting for name, setting in settings.items() if "dense" in name]
    yield (
        "the same pair of figures is claimed for three models",
        len({tuple(each["tokens_per_s"]) for each in dense}) == 1,
    )
    yield "three models are dense", len(dense) == 3
    fastest_ones = {setting["best"][0]["name"] for setting in settings.values()}
    yield "replicas are faster than every partition in every setting", fastest_ones == {"dp16"}
    main = settings["paper_dense_16l"]
    below = {
        name
        for name, setting in settings.items()
        if modelled(setting, "helix_4x4", "perslice")["tokens_per_s"] < setting["tokens_per_s"][1]
    }
    yield "per-slice is modelled below the claim for all but 2 layers", set(settings) - below == {"paper_dense_2l"}
    speeds = [modelled(main, "helix_4x4", "perslice"), modelled(main, "helix_1x16")]
    yield (
        "per-slice on 4x4 is modelled at the speed of helix_1x16",
        len({each["tokens_per_s"] for each in speeds}) == 1,
    )


def _known(sources: Sources) -> Said:
    rows = [row for mode in ("generate", "train") for row in sources.json(f"plan_known_{mode}")["rows"]]
    yield "of known models slicing ties at best", max(row["ratio"] for row in rows if row["ratio"]) < 1.005
    sliced = {row["model"] for row in rows if row["best"] and row["best"]["layout"]["m"] > 1}
    yield "of known models Llama 3 70B alone is planned with slices", sliced == {"llama3_70b"}
    latent = [row["refusal"] for row in rows if row["model"] == "deepseek_v3"]
    yield "DeepSeek-V3 is refused", all(latent)


def _is_tie(paired: dict[str, Any]) -> bool:
    low, high = paired["ci95"]
    return bool(low < 1 < high)
