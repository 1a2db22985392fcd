"""What a rank found of a case, from its tensors and its collectives."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from helix.certify.certificate import Copy, Traffic
from helix.comm.record import Log


def traffic(phase: str, log: Log, predicted: Mapping[str, int]) -> list[Traffic]:
    """Every collective that was executed or predicted; one that moves nothing is neither."""
    executed = +Counter(log.bytes)
    return [
        Traffic(phase, key, executed[key], predicted.get(key, 0)) for key in dict.fromkeys((*executed, *predicted))
    ]


def copy(tensor: str, holders: str, value: Tensor) -> Copy:
    return Copy(tensor, holders, zlib.crc32(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()))


def copies(name: str, parameter: Tensor) -> list[Copy]:
    """A parameter's gradient, where other ranks hold the same; those are the ranks that hold the same shard."""
    gradient = parameter.grad
    if not isinstance(gradient, DTensor) or not any(each.is_replicate() for each in gradient.placements):
        return []
    mesh, coordinates = gradient.device_mesh, gradient.device_mesh.get_coordinate()
    assert coordinates is not None
    names = mesh.mesh_dim_names or ()
    shard = [
        f"{names[dim]} {coordinates[dim]}"
        for dim, placement in enumerate(gradient.placements)
        if placement.is_shard() and mesh.size(dim) > 1
    ]
    return [copy(f"gradient of {name}", ", ".join(shard) or "the grid", gradient.to_local())]


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's shard of a parameter's gradient; None if there is none, or it is still to be summed over ranks."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        return None if any(each.is_partial() for each in gradient.placements) else gradient.to_local()
    return gradient
