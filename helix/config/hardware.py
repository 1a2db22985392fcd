"""What a file of conf/hardware says."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from helix.config.bounds import FIGURES, PLACES, at_least, bounded, one_of

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
# The backend's own, as DTensor and DeepSpeed call them, where Helix's are built from direct exchanges: over gloo.
LIBRARY_KINDS = ("library_all_reduce", "library_all_to_all")


@dataclass
class MeasuredProducts:
    """Matrix products whose smallest dim is `width`: the part of the peak that they reach.

    Args:
        width: of each point, ascending.
        share: of `matmul_*`'s peak; low, high: its 95 % interval.
    """

    width: list[int] = field(default_factory=list, metadata=PLACES)
    share: list[float] = field(default_factory=list, metadata=FIGURES)
    low: list[float] = field(default_factory=list, metadata=FIGURES)
    high: list[float] = field(default_factory=list, metadata=FIGURES)


@dataclass
class MeasuredAttention:
    """Causal fused attention with heads of `head_dim`, its masked half not counted.

    Args:
        length: tokens of a sequence at each point, ascending.
        share: of `matmul_*`'s peak; low, high: its 95 % interval.
    """

    head_dim: int = at_least(1)
    length: list[int] = field(default_factory=list, metadata=PLACES)
    share: list[float] = field(default_factory=list, metadata=FIGURES)
    low: list[float] = field(default_factory=list, metadata=FIGURES)
    high: list[float] = field(default_factory=list, metadata=FIGURES)


@dataclass
class MeasuredExchange:
    """One collective in all groups of `group` of a job's `ranks` at once.

    Args:
        kind: of `KINDS` or `LIBRARY_KINDS`.
        bytes: that each rank sends at each point, by `helix.partition.wire`'s count, ascending.
        us: of one call; low, high: its 95 % interval.
    """

    kind: str = one_of(MISSING, (*KINDS, *LIBRARY_KINDS))
    ranks: int = at_least(2)
    group: int = at_least(2)
    bytes: list[int] = field(default_factory=list, metadata=PLACES)
    us: list[float] = field(default_factory=list, metadata=FIGURES)
    low: list[float] = field(default_factory=list, metadata=FIGURES)
    high: list[float] = field(default_factory=list, metadata=FIGURES)


@dataclass
class MeasuredTurns:
    """How much longer ranks that share cores take than their share of them makes it.

    Args:
        ranks: of each point, ascending.
        times: as long as that share alone would take; low, high: its 95 % interval.
    """

    ranks: list[int] = field(default_factory=list, metadata=PLACES)
    times: list[float] = field(default_factory=list, metadata=FIGURES)
    low: list[float] = field(default_factory=list, metadata=FIGURES)
    high: list[float] = field(default_factory=list, metadata=FIGURES)


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
        dtensor_us: DTensor's dispatch, which a pass of PyTorch's tensor parallelism takes in each layer besides its
            operations and exchanges; null means none: on GPUs it runs ahead of what they compute.
        scores_GB_per_s: at which unfused attention reads and writes its scores, each six times; null means as fast
            as memory.
        rank_MB: what a rank's process takes besides weights and activations: buffers of its libraries.
        ranks_take_turns: whether more ranks than devices may share them, each as fast as its turns allow: on a CPU,
            whose devices are cores.
        turns, products, attention, exchanges: measured curves (`python -m helix calibrate`), which go before the rates
            and shares above; empty where nobody has measured.
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
    dtensor_us: float | None = at_least(0, None)
    scores_GB_per_s: float | None = bounded(None, above=0)
    rank_MB: float | None = at_least(0, None)
    ranks_take_turns: bool = False
    time_error_share: float | None = at_least(0, None)
    turns: MeasuredTurns = field(default_factory=MeasuredTurns)
    products: MeasuredProducts = field(default_factory=MeasuredProducts)
    attention: list[MeasuredAttention] = field(default_factory=list)
    exchanges: list[MeasuredExchange] = field(default_factory=list)
