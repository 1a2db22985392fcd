"""Parameters as DTensors: made whole by definition, held in shards, used as plain local tensors.

DTensor is the type of the *parameter* (so that checkpoints reshard by themselves and a gradient says over
which axes it is still unreduced), not of the activations: its dispatch in the hot path costs more than the
collectives it would save writing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor, empty


class Work(Enum):
    """What the ranks of an axis do with a parameter that they all hold.

    SHARDED: each something else (its own heads, its own tokens), so each one's gradient is a summand.
    REPLICATED: all the same, so each one's gradient is already the whole.
    """

    SHARDED = "sharded"
    REPLICATED = "replicated"


def empty_parameter(
    shape: Sequence[int], mesh: DeviceMesh | None, placements: Sequence[Placement], dtype: torch.dtype | None = None
) -> nn.Parameter:
    """An uninitialised parameter of the whole's `shape`, holding only this rank's shard.

    Without a mesh (single device) it is a plain tensor.
    """
    if mesh is None:
        return nn.Parameter(torch.empty(*shape, dtype=dtype))
    return nn.Parameter(
        empty(*shape, dtype=dtype or torch.get_default_dtype(), device_mesh=mesh, placements=placements)
    )


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's shard of `whole`, which every rank holds, into the parameter. Moves nothing."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            whole = whole.to(parameter.to_local().device)
            shards = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shards.to_local())
        else:
            parameter.copy_(whole)


def fill_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill with this rank's shard of a normal tensor that depends on seed and name only, not on the layout.

    Every rank draws the whole and keeps its shard: the peak is one whole parameter, and nothing is moved.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    fill(parameter, torch.randn(*parameter.shape, generator=generator, dtype=torch.float32) * std)


def local(parameter: Tensor, work: Work = Work.SHARDED) -> Tensor:
    """This rank's shard as a plain tensor; the gradient comes back as a DTensor.

    Over an axis that the parameter is replicated on, the gradient is marked `Partial` if the ranks' work is
    sharded; `helix.parallel.gradients` reduces it over those axes and no others.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if work is Work.REPLICATED:
        return parameter.to_local(grad_placements=parameter.placements)
    return parameter.to_local(
        grad_placements=[Partial() if isinstance(p, Replicate) else p for p in parameter.placements]
    )


def whole(parameter: Tensor) -> Tensor:
    """The whole tensor on every rank (an all-gather); for tests, reports and the oracle."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
