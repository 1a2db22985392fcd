"""FSDP2 over the data axis, inside of which every parameter keeps its own partition.

    wq[H@head, P, (D/P)@slice, E]   ->   wq[H@head, P, (D/P)@slice, E@data]

Each parameter is cut once more, along a dim that the model's axes leave whole; so its shards stay plain blocks,
and a checkpoint of them loads on any other grid. `torch.distributed.fsdp.fully_shard` gathers a unit's shards
before it runs and reduce-scatters the averaged gradients after its backward. What a rank holds of parameters,
gradients and optimizer state falls to 1 / data; what is moved is an all-gather more than plain data parallelism
in forward, and one in backward.

Left replicated, and averaged by `reduce_gradients`, is what is small: norms and other vectors, parametrized
weights (the experts' router); and matrices of another dtype than their unit's, or without a dim to cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils.parametrize import ParametrizationList

from helix.comm.mesh import Mesh

# What has no forward of its own; their subclasses may have one.
_LISTS = (nn.ModuleList, nn.ModuleDict)


def shard_over_data(module: nn.Module, mesh: Mesh) -> list[FSDPModule]:
    """Shard the module's parameters over the data axis, in place.

    A unit, whose parameters are gathered together, is each child of `module` and each element of a list of
    modules in it (a transformer's blocks, a layer's experts). A unit's parameters must be used in its forward.

    Returns:
        The units, inner ones first.
    """
    return [shard for unit in _units(module) if (shard := _shard(unit, mesh)) is not None]


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Inner ones first, as each takes what an inner one has not taken."""
    for child in module.children():
        yield from _lists(child)
        if type(child) not in _LISTS:
            yield child


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the lists in a module."""
    for child in module.children():
        yield from _lists(child)
        if type(module) in _LISTS and not isinstance(child, ParametrizationList):
            yield child


def _shard(unit: nn.Module, mesh: Mesh) -> FSDPModule | None:
    taken = {parameter for parameter in unit.parameters() if _over_data(parameter)}
    own = [parameter for parameter in unit.parameters() if parameter not in taken]
    computed = {p for module in unit.modules() if isinstance(module, ParametrizationList) for p in module.parameters()}
    free = {parameter: _free_dim(parameter, mesh.data.size) for parameter in own if parameter not in computed}
    dims = {parameter: dim for parameter, dim in free.items() if dim is not None}
    if not dims:
        return None
    dtype = max((parameter.dtype for parameter in dims), key=lambda kind: _numel(dims, kind))
    dims = {parameter: dim for parameter, dim in dims.items() if parameter.dtype == dtype}
    return fully_shard(
        unit,
        mesh=mesh.device_mesh["data"],
        shard_placement_fn=lambda parameter: Shard(dims[parameter]),
        ignored_params={parameter for parameter in own if parameter not in dims},
    )


def _numel(parameters: dict[nn.Parameter, int], dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.dtype == dtype)


def _over_data(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and "data" in (parameter.device_mesh.mesh_dim_names or ())


def _free_dim(parameter: nn.Parameter, ranks: int) -> int | None:
    """The first dim of a matrix that no axis cuts and `ranks` divides."""
    cut = {p.dim for p in parameter.placements if isinstance(p, Shard)} if isinstance(parameter, DTensor) else set()
    free = (dim for dim in range(parameter.ndim) if dim not in cut and parameter.shape[dim] % ranks == 0)
    return next(free, None) if parameter.ndim > 1 else None
