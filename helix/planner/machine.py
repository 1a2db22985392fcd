"""A machine as the time model sees it, and how long its collectives take.

Two levels: devices of one island share a fast link (NVLink, or a host's PCIe), islands are joined by what each device
has of the network. Ranks are numbered as the mesh numbers them, data x stage x head x slice with slices innermost, so
that an m-group lies inside an island wherever it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from helix.config.schema import ConfigError, HardwareConfig
from helix.planner import curves
from helix.planner.curves import Exchanges, Shares

# The catalogue's key for each precision in Lightning's names: what matrix products read.
_PEAK = {
    "64-true": "matmul_fp64_TFLOP_per_s",
    "32-true": "matmul_fp32_TFLOP_per_s",
    "bf16-true": "matmul_bf16_TFLOP_per_s",
    "16-true": "matmul_bf16_TFLOP_per_s",
    "bf16-mixed": "matmul_bf16_TFLOP_per_s",
    "16-mixed": "matmul_bf16_TFLOP_per_s",
}
_NEEDED = ("matmul_share", "attention_share", "memory_GB_per_s", "memory_share", "devices_per_host", "kernel_us")
_WITHIN = ("link_GB_per_s", "link_share", "link_latency_us")
_ACROSS = ("host_link_GB_per_s", "host_link_share", "host_link_latency_us")


@dataclass(frozen=True)
class Machine:
    """`devices` equal devices; every rate is what is reached, not the peak.

    Args:
        island: devices that share the fast link.
        flops_per_s: of large matrix products; attention_flops_per_s: of fused attention.
        memory_bytes: of one device; infinite where the hardware does not say.
        memory_bytes_per_s: of one device.
        link_bytes_per_s, host_link_bytes_per_s: one device, one direction, inside an island and out of it.
        link_s, host_link_s: the smallest exchange between two devices.
        kernel_s: the smallest operation.
        dtensor_s: DTensor's dispatch in one layer of tensor parallelism.
        scores_bytes_per_s: at which unfused attention's scores are read and written; None for as fast as anything.
        rank_bytes: of a rank's process besides weights and activations.
        turns: times as long as alone an operation takes where ranks share devices and wait for each other's.
        shares: parts of the peak that operations reach by their size, where they were measured.
        exchanges: times of collectives inside an island, where they were measured.
        error: part by which times were off at the median, where that was measured; None where never.
        sizes: island and turns of another number of devices, as far as the hardware tells; None for the same.
    """

    name: str
    devices: int
    island: int
    flops_per_s: float
    attention_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float
    link_s: float
    host_link_s: float
    kernel_s: float
    dtensor_s: float = 0.0
    scores_bytes_per_s: float | None = None
    rank_bytes: float = 0.0
    turns: float = 1.0
    shares: Shares | None = None
    exchanges: Exchanges | None = None
    error: float | None = None
    sizes: Callable[[int], tuple[int, float]] | None = field(default=None, compare=False, repr=False)

    def at(self, devices: int) -> Machine:
        """The same with another number of devices.

        Raises:
            ConfigError: naming the figures of the hardware that are missing for so many.
        """
        island, turns = (self.island, self.turns) if self.sizes is None else self.sizes(devices)
        return replace(self, devices=devices, island=island, turns=turns)

    def matmul(self, flops: float, nbytes: float, width: float = math.inf) -> float:
        """Seconds of one matrix product: its arithmetic or its memory traffic, whichever takes longer.

        Args:
            width: the smallest of its three dims.
        """
        rate = self.flops_per_s
        if self.shares is not None:
            rate *= self.shares.products(width)
        return self._operation(flops / rate, nbytes)

    def attention(self, flops: float, nbytes: float, head_dim: float = math.inf, length: float = math.inf) -> float:
        """Seconds of fused attention with heads of `head_dim` over sequences of `length`."""
        rate = self.attention_flops_per_s
        if self.shares is not None:
            rate = self.flops_per_s * self.shares.attending(head_dim, length)
        return self._operation(flops / rate, nbytes)

    def stream(self, nbytes: float) -> float:
        """Seconds of an operation that only reads and writes."""
        return self._operation(0.0, nbytes)

    def dispatch(self) -> float:
        """Seconds in which DTensor finds out what to do in a layer of tensor parallelism."""
        return self.dtensor_s * self.turns

    def scores(self, nbytes: float) -> float:
        """Seconds in which attention that is no fused kernel reads and writes its scores."""
        rate = self.scores_bytes_per_s or self.memory_bytes_per_s
        return (nbytes / rate + self.kernel_s) * self.turns

    def _operation(self, computing_s: float, nbytes: float) -> float:
        return (max(computing_s, nbytes / self.memory_bytes_per_s) + self.kernel_s) * self.turns

    def slot(self, part: float) -> float:
        """Time of work with only a part of the ranks busy, over that with all: less than 1 where they share cores."""
        return max(part, 1 / self.turns)

    def spread(self, size: int, stride: int) -> int:
        """How many ranks of a group have each other in their island, where the fewest have: ranks r + stride * k.

        Groups that do not fill islands evenly straddle them: of blocks of 12 on islands of 8 some island has 4.
        """
        if self.devices <= self.island or size == 1:
            return size
        block = size * stride
        if self.island % block == 0:
            return size
        return max(1, math.gcd(block, self.island) // stride)

    def collective(self, kind: str, nbytes: float, size: int, stride: int = 1, library: bool = False) -> float:
        """Seconds of a collective in which each of `size` ranks sends `nbytes`, by `helix.partition.wire`'s count.

        Alpha-beta: the latency of as many exchanges as a tree has levels, twice for an all-reduce, and the bytes over
        the slower of the two links, which work at the same time. Across islands a gather or a reduction moves
        each island's share once through the links of all its members; an all-to-all sends what is not for the island.

        Args:
            library: whether the backend's own is called, not Helix's; only measured curves know of a difference.
        """
        if size == 1 or nbytes == 0:
            return 0.0
        local = self.spread(size, stride)
        if self.exchanges is not None and local == size:
            own = f"library_{kind}"
            kind = own if library and self.exchanges.has(own) else kind
            return self.exchanges.seconds(kind, nbytes, size, min(self.devices, self.island))
        islands = -(-size // local)
        if kind == "all_to_all":
            steps = max(self.link_s if local > 1 else 0.0, self.host_link_s if islands > 1 else 0.0)
            within, across = nbytes * (local - 1) / (size - 1), nbytes * (size - local) / (size - 1)
        else:
            levels = math.ceil(math.log2(local)) * self.link_s + math.ceil(math.log2(islands)) * self.host_link_s
            steps = levels * (2 if kind == "all_reduce" else 1)
            within = nbytes if local > 1 else 0.0
            across = nbytes * (size - local) / (size - 1) / local
        seconds = within / self.link_bytes_per_s
        if islands > 1:
            seconds = max(seconds, across / self.host_link_bytes_per_s)
        return steps + seconds

    def send(self, nbytes: float, distance: int) -> float:
        """Seconds of one message to the rank that is `distance` further."""
        inside = self.devices <= self.island or distance < self.island
        rate, latency = (
            (self.link_bytes_per_s, self.link_s) if inside else (self.host_link_bytes_per_s, self.host_link_s)
        )
        return nbytes / rate + latency


def machine_of(hardware: HardwareConfig, precision: str, devices: int | None = None) -> Machine:
    """The machine that a catalogue's file describes.

    Args:
        devices: how many to take; as many as the file's system has if None.

    Raises:
        ConfigError: naming the figures that are missing.
    """
    if devices is None:
        _check_figures(hardware, precision, 1, ["hosts", "devices_per_host"])
        devices = (hardware.hosts or 1) * (hardware.devices_per_host or 1)
    island, turns = _sizes(hardware, precision, devices)
    return _machine(hardware, precision, devices, island, turns)


def _sizes(hardware: HardwareConfig, precision: str, devices: int) -> tuple[int, float]:
    """Island and turns of so many devices."""
    island = hardware.devices_per_island or hardware.devices_per_host or 1
    if hardware.ranks_take_turns:
        island = max(island, devices)
    needed = [*(_WITHIN if devices > 1 else ()), *(_ACROSS if devices > island else ())]
    _check_figures(hardware, precision, devices, needed)
    return island, curves.turns(hardware, devices)


def _check_figures(hardware: HardwareConfig, precision: str, devices: int, also: Sequence[str]) -> None:
    needed = [_PEAK[precision], *_NEEDED, *also]
    missing = [f"hardware.{key}" for key in needed if _is_missing(key, getattr(hardware, key))]
    if missing:
        raise ConfigError(
            f"hardware={hardware.name} does not say {', '.join(missing)}, which a plan of {devices} devices with "
            f"precision={precision} needs; give them, or take hardware=dgx_h100, h200, dgx_b200, dgx_a100 or l40s"
        )


def _is_missing(key: str, value: float | None) -> bool:
    return value is None or (value == 0 and key.endswith("per_s"))


def _machine(hardware: HardwareConfig, precision: str, devices: int, island: int, turns: float) -> Machine:
    def rate(key: str, share: str, unit: float) -> float:
        return (getattr(hardware, key) or math.inf) * (getattr(hardware, share) or 1.0) * unit

    def seconds(key: str) -> float:
        return (getattr(hardware, key) or 0.0) * 1e-6

    return Machine(
        name=hardware.name,
        devices=devices,
        island=island,
        flops_per_s=rate(_PEAK[precision], "matmul_share", 1e12),
        attention_flops_per_s=rate(_PEAK[precision], "attention_share", 1e12),
        memory_bytes=(hardware.memory_GB_per_device or math.inf) * 1e9,
        memory_bytes_per_s=rate("memory_GB_per_s", "memory_share", 1e9),
        link_bytes_per_s=rate("link_GB_per_s", "link_share", 1e9),
        host_link_bytes_per_s=rate("host_link_GB_per_s", "host_link_share", 1e9),
        link_s=seconds("link_latency_us"),
        host_link_s=seconds("host_link_latency_us"),
        kernel_s=seconds("kernel_us"),
        dtensor_s=seconds("dtensor_us"),
        scores_bytes_per_s=None if hardware.scores_GB_per_s is None else hardware.scores_GB_per_s * 1e9,
        rank_bytes=(hardware.rank_MB or 0.0) * 1e6,
        turns=turns,
        shares=curves.shares(hardware),
        exchanges=curves.exchanges(hardware.exchanges),
        error=hardware.time_error_share,
        sizes=partial(_sizes, hardware, precision),
    )
