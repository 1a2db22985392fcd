"""A whole calibration: a launch for what devices do by themselves, and one for each number of ranks that exchange."""

from __future__ import annotations

from dataclasses import replace

import torch

from helix.calibration.compute import Label, compute_times
from helix.calibration.exchanges import exchange_times
from helix.calibration.points import Points
from helix.calibration.results import Calibration, Host, computing, exchanging
from helix.calibration.rounds import slowest
from helix.config.hardware import HardwareConfig
from helix.ranks.launch import launch
from helix.study import provenance

HANG_S = 300.0  # a call takes a second at most; gloo by itself would wait 30 minutes for a lost rank


def calibrate(name: str, points: Points) -> Calibration:
    """Measure this machine.

    Args:
        name: of the hardware.

    Raises:
        RankError: if a rank was killed.
    """
    ranks = launch(_computing, points, ranks=points.devices, device=points.device, timeout_s=HANG_S)
    host = ranks[0][0]
    found = computing(points, slowest([times for _, times in ranks]))
    times, buffers = {}, {}
    for number in points.ranks:
        each = launch(exchange_times, points, ranks=number, device=points.device, timeout_s=HANG_S)
        times[number] = slowest([labels for labels, _ in each])
        buffers[number] = [nbytes for _, nbytes in each]
    found = exchanging(found, times, buffers)
    return replace(found, hardware=_named(found.hardware, name, host))


def _computing(points: Points) -> tuple[Host, dict[Label, list[float]]]:
    return _host(points), compute_times(points)


def _host(points: Points) -> Host:
    """Asked on a rank: the launcher must not wake the driver, whose state no fork survives."""
    if points.device == "cuda":
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Host(found.name, round(found.total_memory / 1e9, 1))
    return Host(provenance.processor(), None)


def _named(hardware: HardwareConfig, name: str, host: Host) -> HardwareConfig:
    count, what = hardware.devices_per_host, "GPUs" if host.memory_GB else "cores"
    commit = provenance.git_commit() or "no repository"
    source = (
        f"measured on {count} {what} ({host.processor}), torch {torch.__version__}, {provenance.now()}, "
        f"commit {commit}"
    )
    return replace(hardware, name=name, source=source, memory_GB_per_device=host.memory_GB)
