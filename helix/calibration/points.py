"""What a calibration measures, and on how many ranks; known before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from helix.config import environment

# How a calibration's file begins.
MARK = "# Measured by `python -m helix calibrate`"


@dataclass(frozen=True)
class Layer:
    """Dims that most operations of a calibration have.

    Args:
        tokens: rows of products and streams.
        width, hidden: of the residual stream and of the MLP.
        head_dim: of RoPE's heads.
    """

    tokens: int
    width: int
    hidden: int
    head_dim: int


@dataclass(frozen=True)
class Points:
    """What to measure.

    Args:
        device: cpu or cuda.
        devices: of this host, on which compute is measured at once.
        ranks: numbers of ranks that exchange.
        precision: torch's name of the dtype that shares of the peak are measured in; others have their peaks alone.
        rounds: passes over all points, of which every figure is the median.
        layer: dims of the operations.
        widths: smallest dims of matrix products.
        head_dims, lengths: of attention.
        attention_flops: of one call of it.
        sizes: bytes that each rank sends.
    """

    device: str
    devices: int
    ranks: tuple[int, ...]
    precision: str
    rounds: int
    layer: Layer
    widths: tuple[int, ...]
    head_dims: tuple[int, ...]
    lengths: tuple[int, ...]
    attention_flops: float
    sizes: tuple[int, ...]


def points_of(device: str, ranks: int, quick: bool) -> Points:
    """What to measure on a device.

    Args:
        ranks: the most that exchange: powers of two up to there.
        quick: few points, in few rounds: to see that a calibration works, not to plan by.
    """
    powers = (2**power for power in range(1, 64))
    numbers = tuple(takewhile(lambda number: number <= ranks, powers))
    make = _gpus if device == "cuda" else _cores
    return make(numbers, quick)


def _cores(ranks: tuple[int, ...], quick: bool) -> Points:
    return Points(
        device="cpu",
        devices=environment.cores(),
        ranks=ranks,
        precision="float32",
        rounds=6 if quick else 9,
        layer=Layer(256, 256, 1024, 32) if quick else Layer(1024, 512, 2048, 32),
        widths=(16, 128) if quick else (8, 16, 32, 64, 128, 256, 512, 1024),
        head_dims=(16, 64) if quick else (8, 16, 32, 64, 128),
        lengths=(64, 256) if quick else (64, 256, 1024),
        attention_flops=2e7 if quick else 2e8,
        sizes=(256, 1048576) if quick else (256, 8192, 262144, 1048576, 4194304),
    )


def _gpus(ranks: tuple[int, ...], quick: bool) -> Points:
    return Points(
        device="cuda",
        devices=environment.gpus(),
        ranks=ranks,
        precision="bfloat16",
        rounds=6 if quick else 9,
        layer=Layer(8192, 4096, 16384, 128),
        widths=(64, 1024) if quick else (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        head_dims=(64, 128) if quick else (8, 16, 32, 64, 128, 256),
        lengths=(256, 1024) if quick else (64, 256, 1024, 4096),
        attention_flops=1e11,
        sizes=(4096, 2**20) if quick else (256, 4096, 65536, 2**20, 2**23, 2**25, 2**27),
    )
