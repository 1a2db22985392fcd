"""What one device does by itself: products, attention, streams, and the overhead of an operation; on every device.

All devices of the host compute at once, one rank each, as the ranks of a model do: they share its memory and its
power.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from helix.attention.kernel import fused_attention, rotate_slice, unpack
from helix.attention.schedules import score
from helix.calibration.points import Layer, Points
from helix.calibration.rounds import timed
from helix.comm.mesh import SINGLE, Mesh
from helix.models.plain import PlainTransformer
from helix.models.transformer import Transformer
from helix.parallel.tensor_parallel import tensor_parallel
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.ranks.process_group import own_device

# What was timed, and the sizes of the point.
Label = tuple[str | int, ...]
Works = dict[Label, Callable[[], object]]

# Matrix products in these dtypes too, of one size: they have their own peaks.
OTHER_PRECISIONS = {"cpu": ("float64", "bfloat16"), "cuda": ("float32", "float64")}
FEW_LAYERS, MANY_LAYERS = 2, 10
# Products read weights that others' calls have pushed out of the nearest cache, as a model's layers do.
_WEIGHTS = 4
_SCORES_LENGTH = 256
TURN = "turn"
_TURN_ROWS, _TURN_CALLS = 64, 4  # about what one of 16 ranks computes between two exchanges
_ATTENTION_BYTES = 2**26  # of queries, keys and values of one call


def compute_times(points: Points) -> dict[Label, list[float]]:
    """On every rank: seconds of each operation in each pass."""
    device = own_device(points.device)
    torch.manual_seed(dist.get_rank())
    return timed(
        {
            **_products(points, device),
            **_attention(points, device),
            **_streams(points, device),
            **_scores(points, device),
            **_models(device),
            **({(TURN,): block(points.layer)} if device.type == "cpu" else {}),
        },
        device,
        points.rounds,
        f"products, attention and memory of {points.devices} {'GPUs' if points.device == 'cuda' else 'cores'}",
        time.monotonic if points.device == "cuda" else time.process_time,
    )


def block(layer: Layer) -> Callable[[], None]:
    """A millisecond or two of products, between two exchanges, of a rank that shares cores with others."""
    x, weight = torch.randn(_TURN_ROWS, layer.width), torch.randn(layer.width, layer.width)
    # Into one place: fresh memory of that size comes from the heap or the kernel, by what ran before, which made the
    # same products take 1.5 or 3.7 ms, and times with exchanges a half or one and a half of those without.
    out = torch.empty(_TURN_ROWS, layer.width)

    def run() -> None:
        for _ in range(_TURN_CALLS):
            torch.mm(x, weight, out=out)

    return run


def product_flops(layer: Layer, width: int) -> int:
    """FLOPs of one call of `product`: into `width` and out of it again."""
    rows, inner = _product_dims(layer, width)
    return 2 * 2 * rows * inner * width


def attention_count(points: Points, head_dim: int, length: int) -> tuple[int, int]:
    """Samples and heads of one call."""
    one = attention_flops(1, 1, length, head_dim)
    room = _ATTENTION_BYTES // (3 * length * head_dim * _dtype(points.precision).itemsize)
    count = max(1, min(round(points.attention_flops / one), room))
    heads = min(16, count)
    return max(1, count // heads), heads


def attention_flops(samples: int, heads: int, length: int, head_dim: int) -> int:
    """FLOPs of Q K^T and P V, the masked half left out, as `helix.partition.cost` counts them."""
    return 4 * samples * heads * head_dim * (length * (length + 1) // 2)


def stream_bytes(layer: Layer, itemsize: int) -> dict[str, int]:
    """Bytes that one call of each stream reads and writes, by the planner's count."""
    stream, hidden = layer.tokens * layer.width, layer.tokens * layer.hidden
    numbers = {"rms_norm": 2 * stream, "add": 3 * stream, "gelu": 2 * hidden, "rope": 4 * stream}
    return {name: count * itemsize for name, count in numbers.items()}


def scores_dims(points: Points) -> tuple[int, int, int]:
    """Samples, heads and length of the unfused attention: as many scores as its layer's hidden numbers, or more."""
    return max(1, points.layer.tokens // _SCORES_LENGTH), points.layer.width // points.layer.head_dim, _SCORES_LENGTH


def narrow_dim(points: Points) -> int:
    """Features of a value, of which four ranks have a slice each."""
    return points.layer.head_dim // 4


# How often a layer runs each of them.
STREAMS_OF_A_LAYER = {"rms_norm": 2, "add": 2, "gelu": 1, "rope": 1}


def overhead_shape(layers: int) -> TransformerShape:
    """A model so small that a layer's time on one token is that of starting its operations."""
    return TransformerShape(layers, width=64, heads=4, kv_heads=4, head_dim=16, mlp_hidden=128, vocab=64)


def _product_dims(layer: Layer, width: int) -> tuple[int, int]:
    return max(layer.tokens, width), max(layer.width, width)


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _products(points: Points, device: torch.device) -> Works:
    main = _dtype(points.precision)
    works: Works = {("product", width): _product(points.layer, width, main, device) for width in points.widths}
    for name in OTHER_PRECISIONS[points.device]:
        width = points.layer.width // 2
        works["precision", name] = _product(points.layer, width, _dtype(name), device)
    works["precision", points.precision] = _product(points.layer, points.layer.width // 2, main, device)
    return works


def _product(layer: Layer, width: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """[rows, inner] x [inner, width] and [rows, width] x [width, inner], as the two halves of a cut layer are."""
    rows, inner = _product_dims(layer, width)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weights: Iterator[tuple[Tensor, Tensor]] = cycle(
        [
            (
                torch.randn(width, inner, device=device).to(dtype) * inner**-0.5,
                torch.randn(inner, width, device=device).to(dtype) * width**-0.5,
            )
            for _ in range(_WEIGHTS)
        ]
    )

    def call() -> Tensor:
        into, out = next(weights)
        return F.linear(F.linear(x, into), out)

    return call


def _attention(points: Points, device: torch.device) -> Works:
    works: Works = {}
    for head_dim in points.head_dims:
        for length in points.lengths:
            samples, heads = attention_count(points, head_dim, length)
            qkv = torch.randn(samples, length, 3 * heads, head_dim, device=device).to(_dtype(points.precision))
            q, k, v = unpack(qkv, heads)
            works["attention", head_dim, length] = partial(fused_attention, q, k, v, causal=True)
    return works


def _scores(points: Points, device: torch.device) -> Works:
    """Attention that writes its scores, as the schedules `score` and `gather` compute it.

    On a GPU the latter is a fused kernel, if torch has one for values that are narrower than keys.
    """
    samples, heads, length = scores_dims(points)
    qkv = torch.randn(samples, length, 3 * heads, points.layer.head_dim, device=device).to(_dtype(points.precision))
    works: Works = {("scores", "score"): partial(score.attend, qkv, heads, SINGLE, causal=True)}
    if device.type == "cpu":
        q, k, v = unpack(qkv, heads)
        works["scores", "gather"] = partial(fused_attention, q, k, v[..., : narrow_dim(points)], causal=True)
    return works


def _streams(points: Points, device: torch.device) -> Works:
    layer, dtype = points.layer, _dtype(points.precision)
    x, y = (torch.randn(layer.tokens, layer.width, device=device).to(dtype) for _ in range(2))
    hidden = torch.randn(layer.tokens, layer.hidden, device=device).to(dtype)
    weight = torch.ones(layer.width, device=device, dtype=dtype)
    qk = torch.randn(1, layer.tokens, 2 * layer.width // layer.head_dim, layer.head_dim, device=device).to(dtype)
    return {
        ("stream", "rms_norm"): lambda: F.rms_norm(x, (layer.width,), weight),
        ("stream", "add"): lambda: x + y,
        ("stream", "gelu"): lambda: F.gelu(hidden),
        ("stream", "rope"): lambda: rotate_slice(qk, 0, 1),
    }


def _models(device: torch.device) -> Works:
    """Models whose time is that of starting operations; cut over one rank, DTensor dispatches and sends nothing."""
    mesh = Mesh(Grid(1, 1), data=dist.get_world_size(), device_type=device.type)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    works: Works = {}
    for layers in (FEW_LAYERS, MANY_LAYERS):
        model = Transformer(overhead_shape(layers), mesh, AttentionOptions())
        model.init_weights(0)
        works["layers", layers] = partial(model, token)
        if device.type == "cpu":  # a GPU is handed its operations ahead of time
            cut = tensor_parallel(_plain(layers), mesh.device_mesh["head"])
            works |= {
                ("plain layers", layers): partial(_plain(layers), token),
                ("tensor layers", layers): partial(cut, token),
            }
    return works


def _plain(layers: int) -> PlainTransformer:
    model = PlainTransformer(overhead_shape(layers), torch.float32)
    model.init_weights(0)
    return model
