"""What a file of conf/hardware says."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from helix.config.bounds import at_least, bounded


@dataclass
class HardwareConfig:
    """What devices and the links between them can do; figures are dense, and of one direction.

    null means that nobody has said: a plan that needs the figure asks for it.

    Args:
        hosts, devices_per_host: of the system that is meant; a plan may ask for fewer or more.
        devices_per_island: that share the fast link (NVLink, or a host's PCIe); null means a host's.
        matmul_*: peak of matrix products by the precision of their inputs; FP16 is as fast as BF16.
        *_share: the part of a peak that large products, fused attention, streams through memory, and large
            collectives reach, 0 to 1.
        link_*: between devices of an island; host_link_*: what each device has to those of other islands. A latency
            is that of the smallest exchange between two devices.
        kernel_us: time of the smallest operation on a device.
        time_error_share: part by which step times were off what this file predicts, at the median, where that was
            measured.
    """

    name: str = MISSING
    source: str = MISSING
    hosts: int | None = at_least(1, None)
    devices_per_host: int | None = at_least(1, None)
    devices_per_island: int | None = at_least(1, None)
    matmul_fp64_TFLOP_per_s: float | None = at_least(0, None)
    matmul_fp32_TFLOP_per_s: float | None = at_least(0, None)
    matmul_bf16_TFLOP_per_s: float | None = at_least(0, None)
    matmul_share: float | None = bounded(None, above=0, at_most=1)
    attention_share: float | None = bounded(None, above=0, at_most=1)
    memory_GB_per_device: float | None = at_least(0, None)
    memory_GB_per_s: float | None = at_least(0, None)
    memory_share: float | None = bounded(None, above=0, at_most=1)
    link_GB_per_s: float | None = at_least(0, None)
    link_share: float | None = bounded(None, above=0, at_most=1)
    link_latency_us: float | None = at_least(0, None)
    host_link_GB_per_s: float | None = at_least(0, None)
    host_link_share: float | None = bounded(None, above=0, at_most=1)
    host_link_latency_us: float | None = at_least(0, None)
    kernel_us: float | None = at_least(0, None)
    time_error_share: float | None = at_least(0, None)
