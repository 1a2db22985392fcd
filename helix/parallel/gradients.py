"""Reducing gradients over the axes that they are still unreduced over: the papers' hierarchical synchronisation.

Which axes those are is written on the gradient itself (DTensor's `Partial`, put there by
`helix.comm.parameters.local`), so the path depends on how a parameter is sharded and used, not on its name:
first over the slices of a head group, then over the head groups, then over data replicas.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from helix.comm import transport
from helix.comm.mesh import Mesh, axis_of


def reduce_gradients(module: nn.Module, mesh: Mesh) -> None:
    """Sum every gradient over the axes it is partial on; average over data replicas. In place, after backward."""
    for parameter in module.parameters():
        grad = parameter.grad
        if grad is None:
            continue
        assert isinstance(grad, DTensor)
        local = grad.to_local()
        placements = list(grad.placements)
        names = grad.device_mesh.mesh_dim_names or ()
        for dim in reversed(range(len(placements))):  # the inner axis first
            if placements[dim].is_partial():
                axis = axis_of(_line(grad.device_mesh, names[dim]), names[dim])
                if axis.size > 1:
                    local = transport.all_reduce(local, axis, f"gradient.{axis.name}")
                placements[dim] = Replicate()
        if mesh.data.size > 1:
            local = transport.all_reduce(local, mesh.data, "gradient.data") / mesh.data.size
        parameter.grad = _like(local, grad, placements)


def _line(mesh: DeviceMesh, name: str) -> DeviceMesh:
    return mesh if mesh.ndim == 1 else mesh[name]


def _like(local: Tensor, grad: DTensor, placements: list[Placement]) -> DTensor:
    return DTensor.from_local(
        local, grad.device_mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride()
    )
