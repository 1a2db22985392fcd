"""What a calibration's figures are of: the comments of its file."""

from __future__ import annotations

from helix.calibration import compute
from helix.calibration.points import Points

# The catalogue's keys by torch's names of dtypes.
PEAKS = {
    "float64": "matmul_fp64_TFLOP_per_s",
    "float32": "matmul_fp32_TFLOP_per_s",
    "bfloat16": "matmul_bf16_TFLOP_per_s",
}


def notes_of(points: Points, best: int, operations: float) -> dict[str, str]:
    """What each figure is of, by key.

    Args:
        best: smallest dim of the fastest product.
        operations: that the time model counts in a layer.
    """
    layer, where = points.layer, f"on {points.devices} at once" if points.devices > 1 else "on one"
    rows = f"{layer.tokens} rows"
    attending = f"of {points.attention_flops / 1e9:g} GFLOP or less"
    peak = f"F.linear of {rows}, smallest dim {best}, {where}"
    other = f"by its ratio to {points.precision} at smallest dim {layer.width // 2}"
    one = "of one host, on which alone it was measured"
    return {
        "hosts": one,
        "devices_per_host": "that this process may use",
        "devices_per_island": "the host is the island",
        "host_link_GB_per_s": one,
        "host_link_share": one,
        "host_link_latency_us": one,
        "memory_GB_per_device": "ranks share the host's, which is asked" if points.device == "cpu" else "its own",
        **dict.fromkeys(("matmul_share", "memory_share", "link_share"), "measured, not a peak"),
        "ranks_take_turns": "of cores, not of GPUs",
        "time_error_share": "not yet: python -m helix validate --write",
        **{PEAKS[name]: other for name in compute.OTHER_PRECISIONS[points.device]},
        PEAKS[points.precision]: peak,
        "attention_share": "the best of those below",
        "memory_GB_per_s": f"a layer's 2 norms, 2 sums, GELU and RoPE of {layer.tokens} x {layer.width} together, "
        f"{where}",
        "scores_GB_per_s": f"scores of schedule{_unfused(points)} at {compute.scores_dims(points)[2]} tokens, {where}",
        "link_GB_per_s": "all-to-all of 2 ranks, bytes sent by each: slope of its times",
        "link_latency_us": "the same: what no bytes take",
        "kernel_us": f"a layer of width 64 on one token over the {operations:g} operations that the planner counts in "
        f"it, {where}",
        "dtensor_us": f"a layer of width 64 on one token, cut over one rank, less the same uncut, {where}",
        "rank_MB": "growth over the first step of a small model, less its activations"
        if points.device == "cpu"
        else "in use after the first step of a small model, less its tensors",
        "turns": "products between two exchanges, the exchange left out, by the clock",
        "products": f"[{rows}, {layer.width} or more] x [.., width] and back, {points.precision}, {where}",
        "attention": f"fused and causal, {attending} a call, half of the scores counted, {where}",
        "exchanges": "all groups at once, calls back to back, the slowest rank",
    }


def _unfused(points: Points) -> str:
    return "s score and gather" if points.device == "cpu" else " score"
