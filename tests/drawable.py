"""Small data of every figure, and the figures drawn from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helix.figures import training
from helix.figures.attention import attention_maps
from helix.figures.claims import claimed_and_found
from helix.figures.errors import error_of
from helix.figures.exchange import exchange
from helix.figures.growth import bytes_inside, growth
from helix.figures.losses import curves
from helix.figures.maps import winning_map
from helix.figures.ownership import ownership
from helix.figures.predictions import predictions
from helix.figures.ratios import forest, ratios
from helix.figures.search import search_growth
from helix.figures.settings import Drawn, Seeds, settings
from helix.figures.style import COLUMN, SCHEDULES
from helix.figures.sweep import bars, heat_map
from helix.figures.traffic import bytes_of
from helix.partition.grid import Grid

ERRORS = pd.DataFrame(
    {"schedule": schedule, "reference": reference, "precision": precision, "error": error}
    for schedule, precision, reference, error in (
        ("batch", "fp32", "h heads", 2e-7), ("batch", "fp32", "h*m narrow heads", 0.8),
        ("perslice", "fp32", "h heads", 0.8), ("perslice", "fp32", "h*m narrow heads", 0.0),
        ("batch", "fp64", "h heads", 4e-16), ("perslice", "fp64", "h heads", 0.8),
    )
)  # fmt: skip
EXECUTED = {
    "all_gather/attention.enter": 3_000_000,
    "all_gather/mlp.enter": 1_000_000,
    "all_to_all/attention.qkv": 500_000,
}
TRAFFIC: dict[str, Any] = {
    "helix_4x4": {"executed": EXECUTED, "predicted": EXECUTED},
    "tp16": {"executed": {"all_reduce/mlp": 3_000_000}, "predicted": {"all_reduce/mlp": 2_000_000}},
    "dp16": {"executed": {}, "predicted": {}},
}
RATIOS = pd.DataFrame(
    {
        "label": ["4x4 / tp16", "2x8 / tp16", "4x4 / cp16"],
        "ratio": [2.0, 0.97, math.nan],
        "low": [1.8, 0.9, math.nan],
        "high": [2.2, 1.05, math.nan],
        "group": ["dense", "dense", "moe"],
        "kind": ["measured", "modelled", "measured"],
    }
)
CLAIMS = pd.DataFrame(
    {
        "claim": ["4x4, 16 layers", "4x4 in training", "error against FP32"],
        "unit": ["tokens/s", "tokens/s", "relative error"],
        "claimed": [1.58e6, 1e6, 1e-3],
        "claimed_low": [math.nan, 0.85e6, math.nan],
        "claimed_high": [math.nan, 1.15e6, math.nan],
        "found": [4.2e5, 3.1e5, 0.78],
        "low": [3.2e5, math.nan, 0.7],
        "high": [5.4e5, math.nan, 0.9],
        "kind": ["modelled", "modelled", "measured"],
    }
)
LOSSES = pd.DataFrame(
    {"setting": setting, "seed": seed, "step": step, "loss": 5 / step + 2 + 0.1 * place + 0.01 * seed}
    for place, setting in enumerate(("helix_2x2", "helix_2x2_perslice"))
    for seed in range(3)
    for step in range(1, 21)
)
SWEEP = pd.DataFrame(
    {
        "label": [f"helix_{m}x{n}" for m in (1, 2, 4) for n in (1, 2, 4)],
        "m": [m for m in (1, 2, 4) for _ in range(3)],
        "n": [1, 2, 4] * 3,
        "status": ["done"] * 7 + ["failed", "skipped"],
        "tokens_per_s": [1000.0 * place for place in range(1, 8)] + [math.nan] * 2,
        "tokens_per_s_low": [900.0 * place for place in range(1, 8)] + [math.nan] * 2,
        "tokens_per_s_high": [1100.0 * place for place in range(1, 8)] + [math.nan] * 2,
    }
)
POINTS = pd.DataFrame(
    {
        "schedule": schedule, "x": x, "bytes": 1000 * x * (schedule != "perslice"), "step_ms": 0.1 * x,
        "low": 0.09 * x, "high": 0.12 * x, "error": 0.8 if schedule == "perslice" else 2e-7,
    }
    for schedule in SCHEDULES
    for x in (64, 128, 256, 512, 1024)
)  # fmt: skip
BASELINES = pd.DataFrame(
    {"label": label, "baseline": baseline, "ratio": 1.5, "ratio_low": 1.2, "ratio_high": 1.9}
    for label in ("helix_2x2 seq_len=64", "helix_2x2 seq_len=128")
    for baseline in ("tp4", "helix_2x2_perslice")
)
CELLS = [
    {"x": x, "y": y, "legal": (x, y) != ("1", "1/4"), "sliced": sliced, "rival": rival, "ratio": ratio}
    for (x, y), (sliced, rival, ratio) in zip(
        itertools.product("1248", ("1/4", "262144")),
        (
            (None, None, None), ("a", "b", 1.3), ("a", "b", 0.4), ("a", None, None), (None, "b", None),
            (None, None, None), ("a", "b", 1.0), ("a", "b", 2.4),
        ),
        strict=True,
    )
]  # fmt: skip
PANEL = {
    "goal": "tpot", "x": "devices / key/value heads", "y": "length", "cells": CELLS,
    "rivals": ["data", "tensor", "m = 1"],
    "fixed": "64 devices, batch 64, heads x features kept",
}  # fmt: skip
SEARCHES = {
    "model": "llama3_70b", "hardware": "dgx_h100", "batch": 1024, "length": 4096,
    "limits_s": {"1024": 1.0, "16384": 10.0},
    "searches": [
        {"mode": mode, "devices": devices, "layouts": devices, "processor_s": {"runs": [0.1, 0.2, 0.3], "median": 0.2}}
        for mode in ("forward", "train", "generate")
        for devices in (8, 64, 1024, 16384)
    ],
}  # fmt: skip
VALIDATED = {
    "hardware": "cpu", "kendall_tau": 0.8, "median_error": 0.17,
    "outcomes": [
        {"ranks": ranks, "predicted_ms": 10.0 * ranks, "measured_ms": 12.0 * ranks} for ranks in (2, 4, 8, 16)
    ],
}  # fmt: skip
TRAINED = {
    "method": {"name": "helix_2x2", "schedule": {"prefill": "heads"}}, "seed": 0, "unigram_entropy_bpb": 4.75,
    "losses": [4 - step / 50 for step in range(100)], "learning_rates": [1e-3] * 100, "gradient_norms": [1.5] * 100,
    "loss_scales": [2.0**16] * 100, "skipped_steps": [3, 9], "trainer": {"gradient_clip_val": 1.0},
    "validations": [{"step": 50, "bpb": 4.0}, {"step": 100, "bpb": 3.5}],
}  # fmt: skip
STEPS = np.arange(1.0, 11.0)
SEEDS = Seeds(STEPS, np.stack([5 - STEPS / 9, 5 - STEPS / 8]), 5 - STEPS / 8.5, 4.8 - STEPS / 8.5, 5.2 - STEPS / 8.5)
SETTINGS = [Drawn("helix_2x2", 0, 0, SEEDS, SEEDS), Drawn("helix_2x2_perslice", 1, 0, SEEDS, SEEDS, SEEDS)]
MANY = np.arange(1.0, 61.0)
LOSS, APART = Seeds(MANY, (5 - MANY / 20)[None]), Seeds(MANY, (MANY * 1e-8)[None])
EQUAL = [
    Drawn(f"{layout} model={model}", place, group, LOSS, LOSS, APART if place else None)
    for group, model in enumerate(("tiny", "tiny_moe"))
    for place, layout in enumerate(("single", "helix_2x2", "helix_4x1"))
]

FIGURES: dict[str, Callable[[], Figure]] = {
    "ownership_2x2": lambda: ownership(Grid(2, 2), 4, 2, 8),
    "ownership_4x3": lambda: ownership(Grid(4, 3), 9, 3, 64, rope=True),
    "ownership_4x4": lambda: ownership(Grid(4, 4), 16, 4, 64),
    "ownership_8x8": lambda: ownership(Grid(8, 8), 32, 8, 128),
    "exchange_2": exchange,
    "exchange_4": lambda: exchange(4, ("rows", "gather")),
    "errors": lambda: error_of(ERRORS, {"fp32": 1e-5, "fp64": 1e-12}, about="two cores"),
    "bytes": lambda: bytes_of(TRAFFIC, about="two cores"),
    "forest": lambda: forest(RATIOS, title="Main method / baseline"),
    "ratios": lambda: ratios(BASELINES, "two cores"),
    "claims": lambda: claimed_and_found(CLAIMS),
    "losses": lambda: curves(LOSSES, smooth=3),
    "losses_in_a_column": lambda: curves(LOSSES, smooth=3, wide=COLUMN),
    "forest_in_a_column": lambda: forest(RATIOS, wide=COLUMN),
    "heat_map": lambda: heat_map(SWEEP, "data=2", "two cores"),
    "bars": lambda: bars(SWEEP, "two cores"),
    "growth": lambda: growth(POINTS, POINTS, "L, tokens of one sequence", "two cores"),
    "bytes_inside": lambda: bytes_inside(POINTS, POINTS, about="two cores"),
    "bytes_inside_in_a_column": lambda: bytes_inside(POINTS, POINTS, wide=COLUMN),
    "attention": lambda: attention_maps({"one head of 8": np.eye(16), "formula, slice 0 (colour)": np.eye(16) / 2}),
    "map": lambda: winning_map([PANEL] * 3, "llama3_70b on dgx_h100"),
    "search": lambda: search_growth(SEARCHES),
    "predictions": lambda: predictions(VALIDATED),
    "run": lambda: training.run(TRAINED, "two cores"),
    "settings": lambda: settings(SETTINGS, "Validation above helix_2x2's, bits per byte", False, 3, "two cores"),
    "settings_within_rounding": lambda: settings(EQUAL, "Largest distance so far, nats a token", True, 1, "two cores"),
}
