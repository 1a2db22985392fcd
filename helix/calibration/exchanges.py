"""Collectives of every kind, in groups of every size at once; and the memory that a rank's first step takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from helix.calibration import compute
from helix.calibration.points import Points
from helix.calibration.rounds import timed
from helix.comm import transport
from helix.comm.mesh import Axis, Mesh
from helix.comm.shared_memory import SLOT_BYTES
from helix.config.hardware import KINDS, LIBRARY_KINDS
from helix.models.transformer import Transformer
from helix.partition import wire
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import TransformerCost
from helix.ranks.process_group import own_device
from helix.study.memory import PeakMemory

# Kind, size of a group, and bytes that each rank sends. Of a turn at computing: the ranks, and 1, or 0 for the
# exchange after it by itself.
Label = tuple[str, int, int]
_NAME = "calibration"
_ITEMSIZE = torch.float32.itemsize
_BATCH, _LENGTH = 4, 64


def exchange_times(points: Points) -> tuple[dict[Label, list[float]], int]:
    """On every rank: seconds of each collective in each pass, and bytes that the first step took besides tensors."""
    device = own_device(points.device)
    ranks = dist.get_world_size()
    buffers = _buffers(device)  # before anything else has exchanged
    works: dict[Label, Callable[[], object]] = {}
    for group in groups(ranks):
        axis = Mesh(Grid(group, ranks // group), device_type=device.type).slice
        for kind in KINDS if device.type == "cuda" else (*KINDS, *LIBRARY_KINDS):
            for numel in numels(kind, group, points):
                works[kind, group, sent_bytes(kind, group, numel)] = _work(kind, axis, numel, device)
    if device.type == "cpu":
        axis = Mesh(Grid(ranks, 1)).slice
        block, small = compute.block(points.layer), torch.ones(1)
        works[compute.TURN, ranks, 1] = lambda: (block(), transport.all_gather(small, axis, _NAME))
        works[compute.TURN, ranks, 0] = lambda: transport.all_gather(small, axis, _NAME)
    return timed(works, device, points.rounds, f"collectives of {ranks} ranks"), buffers


def groups(ranks: int) -> list[int]:
    """Sizes of groups that fill so many ranks: powers of two."""
    return [2**power for power in range(1, ranks.bit_length())]


def numels(kind: str, group: int, points: Points) -> list[int]:
    """Numbers of one collective's points, ascending.

    Times of cores jump where a tensor is too large for shared memory: on both sides of that there is a point.
    """
    if kind in LIBRARY_KINDS:
        return sorted({_numel(kind, group, size) for size in points.sizes[::2]})
    found = {_numel(kind, group, size) for size in points.sizes}
    # An uneven all-to-all never goes there, as a rank does not know the others' sizes.
    if points.device == "cpu" and kind != "all_to_all":
        most = SLOT_BYTES // _ITEMSIZE // group * group
        found |= {most, most + group}
    return sorted(found)


def sent_bytes(kind: str, group: int, numel: int) -> int:
    """What a rank sends of `numel` numbers: its shard in a gather, all that it has in the others."""
    kind = kind.removeprefix("library_")
    if kind == "all_to_all":
        return wire.all_to_all(numel, numel // group, _ITEMSIZE)
    count: int = getattr(wire, kind)(numel, group, _ITEMSIZE)
    return count


def _numel(kind: str, group: int, size: int) -> int:
    """Numbers of which a rank sends about `size` bytes; a multiple of the group's size where they are dealt out."""
    kind = kind.removeprefix("library_")
    each = max(1, size // (_ITEMSIZE * (group - 1)))  # that go to each of the others
    if kind == "all_gather":
        return each
    return max(1, each // 2) * group if kind == "all_reduce" else each * group


def _work(kind: str, axis: Axis, numel: int, device: torch.device) -> Callable[[], object]:
    x = torch.ones(numel, device=device)
    if kind == "library_all_reduce":
        return lambda: dist.all_reduce(x, group=axis.group)
    if kind == "library_all_to_all":
        out = torch.empty_like(x)
        return lambda: dist.all_to_all_single(out, x, group=axis.group)
    if kind == "all_to_all":
        rows = [numel // axis.size] * axis.size
        return lambda: transport.all_to_all(x, axis, rows, rows, _NAME)
    collective = getattr(transport, kind)
    return lambda: collective(x, axis, _NAME)


def _buffers(device: torch.device) -> int:
    """Bytes that a rank holds after its first step, less its weights and activations.

    On a GPU it is what the driver says is in use: the context and NCCL's buffers are no tensors.
    """
    ranks = dist.get_world_size()
    shape = TransformerShape(2, width=64, heads=16, kv_heads=16, head_dim=16, mlp_hidden=128, vocab=64)
    grid, options = Grid(2, ranks // 2), AttentionOptions()
    model = Transformer(shape, Mesh(grid, device_type=device.type), options)
    model.init_weights(0)
    tokens = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64, device=device)
    memory = PeakMemory(device)
    with torch.inference_mode():
        model(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, whole = torch.cuda.mem_get_info(device)
        return max(0, whole - free - torch.cuda.memory_reserved(device))
    cost = TransformerCost(shape, grid, options, _BATCH, _LENGTH, _ITEMSIZE)
    return max(0, memory.growth() - cost.activation_bytes())
