"""Finishing gradients after backward: reducing them, their global norm, clipping.

Which axes a gradient is still to be summed over is written on the gradient itself (DTensor's `Partial`, put
there by `helix.comm.parameters.local`), so the path depends on how a parameter is sharded and used, not on its
name: first over the slices of a head group, then over the head groups (an expert's over its replicas), then
over data replicas. That is the papers' hierarchical synchronisation.

    parameter                            gradient after backward                         reduced over
    wq[H@head, P, (D/P)@slice, E]        sharded                                         data
    norm[E], work on N@model tokens      {unreduced: head, slice}                        slice, head, data
    norm[E], work on all N tokens        whole                                           data
    q_norm[P, (D/P)@slice]               {unreduced: head}                               head, data
    up[experts@expert, F, E]             {unreduced: replica}                            replica, data
    an ordinary nn.Linear's weight       whole: every rank of a replica does the same    data

A collective costs milliseconds however little it moves (gloo on shared cores), and norms are many and small:
so all gradients that an axis reduces travel in one flat tensor per dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from helix.comm import transport
from helix.comm.mesh import Axis, Mesh, axis_of
from helix.ranks.process_group import own_device

# A flat tensor is a copy of the gradients in it: large ones gain nothing from company and would cost memory.
BUCKET_BYTES = 32 * 2**20
# An axis that is not named here is reduced between these and data.
_INNER_FIRST = ("slice", "head", "model", "expert", "replica")
Parameters = nn.Module | Iterable[Tensor]


class _Gradient:
    """One parameter's gradient, taken off it while it is reduced, so that the unreduced one is freed.

    Attributes:
        local: this rank's shard.
        unreduced: the axes that it is still to be summed over, by name.
    """

    def __init__(self, parameter: Tensor, axes: _Axes) -> None:
        grad = parameter.grad
        assert grad is not None
        self.parameter, self.grad = parameter, grad
        self.local = local_gradient(grad)
        self.unreduced: dict[str, Axis] = {}
        if isinstance(grad, DTensor):
            partial = [dim for dim, placement in enumerate(grad.placements) if placement.is_partial()]
            found = [axes.of(grad.device_mesh, dim) for dim in partial]
            self.unreduced = {axis.name: axis for axis in found if axis.size > 1}
        parameter.grad = None

    def put_back(self) -> None:
        grad = self.grad
        if not isinstance(grad, DTensor):
            self.parameter.grad = self.local
            return
        placements: list[Placement] = [Replicate() if p.is_partial() else p for p in grad.placements]
        self.parameter.grad = DTensor.from_local(
            self.local, grad.device_mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride()
        )


class _Axes:
    """The axes of the device meshes that gradients lie on, each looked up once."""

    def __init__(self) -> None:
        self._known: dict[tuple[DeviceMesh, int], Axis] = {}

    def of(self, mesh: DeviceMesh, dim: int) -> Axis:
        if (mesh, dim) not in self._known:
            assert mesh.mesh_dim_names is not None
            name = mesh.mesh_dim_names[dim]
            self._known[mesh, dim] = axis_of(mesh if mesh.ndim == 1 else mesh[name], name)
        return self._known[mesh, dim]


def reduce_gradients(of: Parameters, mesh: Mesh) -> None:
    """Sum every gradient over the axes it is partial on; average over data replicas. In place, after backward.

    A parameter that is no DTensor is taken to be replicated, with the same work on every rank of a replica. A
    gradient whose own mesh has a data axis (`helix.parallel.shard_data`) is averaged already. Reducing twice
    changes nothing but the last bit.

    Args:
        of: a module, or parameters, in the same order on every rank.
        mesh: the mesh that they are partitioned on.
    """
    axes = _Axes()
    gradients = [_Gradient(parameter, axes) for parameter in parameters_with_gradient(of)]
    for name in _in_order(gradients):
        _all_reduce([(gradient, gradient.unreduced[name]) for gradient in gradients if name in gradient.unreduced])
    if mesh.data.size > 1:
        _all_reduce([(gradient, mesh.data) for gradient in gradients if not _averaged(gradient.grad)], mean=True)
    for gradient in gradients:
        gradient.put_back()


def global_norm(of: Parameters, mesh: Mesh) -> Tensor:
    """The 2-norm of all gradients as one vector, every parameter counted once; the same on all ranks.

    One scalar is summed over the ranks of a replica (and over its stages): each rank's sum of squares, in fp64,
    weighted by how many ranks hold the same shard, so that no axis set needs a collective of its own.

    Args:
        of: a module, or parameters, in the same order on every rank; their gradients are reduced.
        mesh: the mesh that they are partitioned on.

    Returns:
        A scalar in fp32, or in fp64 where the gradients are.

    Raises:
        ValueError: if a gradient is still partial.
    """
    gradients = [parameter.grad for parameter in parameters_with_gradient(of)]
    over_data = any(_averaged(gradient) for gradient in gradients)
    axes = [mesh.model, mesh.stage, *([mesh.data] if over_data else [])]
    holders = mesh.model.size * (mesh.data.size if over_data else 1)
    total = torch.zeros((), dtype=torch.float64, device=own_device(mesh.device_type))
    for gradient in gradients:
        assert gradient is not None
        squares = torch.linalg.vector_norm(local_gradient(gradient), dtype=torch.float64).square()
        total = total + squares * (_shards(gradient) / holders)
    for axis in axes:
        if axis.size > 1:
            total = transport.all_reduce(total, axis, f"gradient_norm.{axis.name}")
    in_fp64 = any(gradient is not None and gradient.dtype == torch.float64 for gradient in gradients)
    return total.sqrt().to(torch.float64 if in_fp64 else torch.float32)


def clip_gradients(of: Parameters, mesh: Mesh, max_norm: float) -> Tensor:
    """Scale all gradients, in place, so that their global norm is at most `max_norm`.

    Returns:
        The norm before, as `global_norm` gives it.

    Raises:
        ValueError: if max_norm is not above 0, or a gradient is still partial.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, not {max_norm}")
    gradients = list(parameters_with_gradient(of))
    norm = global_norm(gradients, mesh)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the formula of torch.nn.utils.clip_grad_norm_
    for tensors in local_gradients(gradients).values():
        torch._foreach_mul_(tensors, factor.to(tensors[0].dtype))
    return norm


def parameters_with_gradient(of: Parameters) -> Iterator[Tensor]:
    parameters = of.parameters() if isinstance(of, nn.Module) else of
    return (parameter for parameter in parameters if parameter.grad is not None)


def local_gradient(gradient: Tensor) -> Tensor:
    """This rank's shard, not a copy."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def local_gradients(of: Parameters) -> dict[torch.dtype, list[Tensor]]:
    """This rank's shards, not copies, by dtype: what torch's `_foreach` functions take."""
    shards: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters_with_gradient(of):
        assert parameter.grad is not None
        shard = local_gradient(parameter.grad)
        if shard.numel():  # none where there are more ranks than rows
            shards[shard.dtype].append(shard)
    return shards


def _in_order(gradients: list[_Gradient]) -> list[str]:
    """The names of the axes that some gradient is unreduced over, the inner ones first."""
    names = {name: None for gradient in gradients for name in gradient.unreduced}  # in order, as a set is not
    known = [name for name in _INNER_FIRST if name in names]
    return known + [name for name in names if name not in known]


def _all_reduce(work: list[tuple[_Gradient, Axis]], mean: bool = False) -> None:
    """Sum each gradient over its axis, as few collectives as the groups, the dtypes and `BUCKET_BYTES` allow."""
    flows: dict[tuple[str, torch.dtype], list[_Gradient]] = defaultdict(list)
    axes: dict[str, Axis] = {}
    for gradient, axis in work:
        assert axis.group is not None
        axes[axis.group.group_name] = axis
        flows[axis.group.group_name, gradient.local.dtype].append(gradient)
    for (group, _), gradients in flows.items():
        axis = axes[group]
        for bucket in _buckets(gradients):
            flat = bucket[0].local if len(bucket) == 1 else torch.cat([each.local.reshape(-1) for each in bucket])
            flat = transport.all_reduce(flat, axis, f"gradient.{axis.name}").reshape(-1)
            if mean:
                flat /= axis.size
            shares = flat.split([each.local.numel() for each in bucket])
            for each, share in zip(bucket, shares, strict=True):
                each.local = share.view(each.local.shape)


def _buckets(gradients: list[_Gradient]) -> Iterator[list[_Gradient]]:
    """Consecutive gradients, as many as `BUCKET_BYTES` hold, but at least one."""
    bucket: list[_Gradient] = []
    nbytes = 0
    for gradient in gradients:
        if bucket and nbytes + gradient.local.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(gradient)
        nbytes += gradient.local.nbytes
    if bucket:
        yield bucket


def _averaged(gradient: Tensor | None) -> bool:
    """Whether it is sharded over data replicas, and so has been averaged over them."""
    return isinstance(gradient, DTensor) and "data" in (gradient.device_mesh.mesh_dim_names or ())


def _shards(gradient: Tensor) -> int:
    """How many different shards the whole consists of."""
    count = 1
    if isinstance(gradient, DTensor):
        for dim, placement in enumerate(gradient.placements):
            if placement.is_partial():
                raise ValueError("a gradient is still to be summed over the ranks: call reduce_gradients first")
            if placement.is_shard():
                count *= gradient.device_mesh.size(dim)
    return count
