"""The device mesh with axes data, stage, head, slice; the only caller of `init_device_mesh`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from helix.partition.grid import Grid, PartitionError

AXES = ("data", "stage", "head", "slice")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it: the ranks that differ from it along this axis only.

    Args:
        name: the axis' name, for counters and errors.
        size: number of ranks along it.
        rank: this rank's index along it.
        group: their process group; None where size is 1, which no collective then touches.
        exchanges: whether collectives are built from one direct exchange, over gloo or through shared memory (see
            `helix.comm.transport`).
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    exchanges: bool = False


SINGLE = Axis("single", 1, 0, None)
# Backends over which collectives are built from one direct exchange.
DIRECT = {"gloo"}


def axis_of(line: DeviceMesh, name: str) -> Axis:
    """A one-dimensional device mesh as an axis."""
    if line.size() == 1:
        return Axis(name, 1, 0, None)
    group = line.get_group()
    return Axis(name, line.size(), line.get_local_rank(), group, exchanges=dist.get_backend(group) in DIRECT)


class Mesh:
    """data x stage x n x m ranks; slice is the innermost axis, so that an m-group sits on neighbouring devices.

    Args:
        grid: m feature slices by n head groups.
        data: replicas that work on different samples.
        stage: pipeline stages.
        device_type: "cpu" or "cuda".

    Raises:
        PartitionError: if the process group's size is not data * stage * m * n.
    """

    def __init__(self, grid: Grid, data: int = 1, stage: int = 1, device_type: str = "cpu") -> None:
        world = dist.get_world_size()
        if world != data * stage * grid.ranks:
            raise PartitionError(
                f"data={data} x stage={stage} x m={grid.m} x n={grid.n} needs {data * stage * grid.ranks} ranks, "
                f"not the {world} that are running"
            )
        self.grid = grid
        self.device_type = device_type
        self.device_mesh = init_device_mesh(device_type, (data, stage, grid.n, grid.m), mesh_dim_names=AXES)

    @cached_property
    def data(self) -> Axis:
        return axis_of(self.device_mesh["data"], "data")

    @cached_property
    def stage(self) -> Axis:
        return axis_of(self.device_mesh["stage"], "stage")

    @cached_property
    def head(self) -> Axis:
        return axis_of(self.device_mesh["head"], "head")

    @cached_property
    def slice(self) -> Axis:
        return axis_of(self.device_mesh["slice"], "slice")

    @cached_property
    def model(self) -> Axis:
        """All m * n ranks of one replica and stage as one axis, in the order rank = i * m + j."""
        return axis_of(self.flat, "model")

    @cached_property
    def flat(self) -> DeviceMesh:
        """The model axis as a one-dimensional device mesh, for parameters with a dim that all m * n ranks cut.

        Not two shards of the dim on the (head, slice) mesh: where they are uneven, torch 2.13's `full_tensor`
        puts them together in the wrong order (paper/LOG.md, 2026-11-22).
        """
        if self.grid.n == 1:
            return self.weights["slice"]
        return self.weights["head"] if self.grid.m == 1 else self.weights._flatten("model")

    @cached_property
    def weights(self) -> DeviceMesh:
        """The (head, slice) mesh, for attention's parameters."""
        return self.device_mesh["head", "slice"]

    @cache  # noqa: B019  a mesh lives as long as its process group
    def experts(self, size: int) -> DeviceMesh:
        """The (replica, expert) mesh: the m * n ranks of one replica and stage as (m n / size) x size.

        Raises:
            PartitionError: if size does not divide m * n.
        """
        if self.grid.ranks % size:
            raise PartitionError(f"ep_size={size} does not divide m*n={self.grid.ranks}")
        data, stage, *_ = self.device_mesh.shape
        shape = (data, stage, self.grid.ranks // size, size)
        mesh = init_device_mesh(self.device_type, shape, mesh_dim_names=("data", "stage", "replica", "expert"))
        return mesh["replica", "expert"]
