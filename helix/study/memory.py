"""How much memory a step needs: the allocator's peak on CUDA, the resident set's on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from helix.study.profile import keep_quiet


class PeakMemory:
    """Growth of the memory that is in use, from now to its peak.

    On the CPU it is the process's resident set, so library buffers count.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            _return_freed()
            _reset_resident_peak()
            self.before = psutil.Process().memory_info().rss

    def growth(self) -> int:
        """Bytes in use at the peak since the start, less what was in use then."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else _resident_peak()
        return max(0, peak - self.before)


def _return_freed() -> None:
    """Give freed memory back to the system: what the C library kept of an earlier step would hide this one's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's only
    if trim is not None:
        trim(0)


def _reset_resident_peak() -> None:
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # 5: the peak of the resident set starts anew (proc(5))


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # without procfs: what is resident now
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_of_tensors(step: Callable[[], object], device: torch.device) -> int:
    """Bytes by which tensors grow while `step` runs, at their peak, by the allocator's own account.

    Unlike `PeakMemory` on the CPU it knows of no library's buffers, and of nothing that the C library keeps. What
    other threads than the calling one give back, as gloo's at times do, counts as held.
    """
    if device.type == "cuda":
        memory = PeakMemory(device)
        step()
        torch.cuda.synchronize(device)
        return memory.growth()
    keep_quiet()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as observed:
        step()
    held, peak = 0, 0
    for _, change in sorted(_allocations(observed.profiler.kineto_results.experimental_event_tree())):
        held += change
        peak = max(peak, held)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """When bytes were taken, or given back as a negative number."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)
