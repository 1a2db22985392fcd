"""`HelixStrategy`: what Lightning needs to run a module whose layers are partitioned.

    class Lit(LightningModule):
        def configure_model(self):
            self.model = Transformer(shape, self.trainer.strategy.mesh, options)

    Trainer(strategy=HelixStrategy(Grid(m=4, n=4)), devices=16, ..).predict(Lit(), loader)

It provides processes, process group and mesh. The mathematics is the layers'; ranks are started by
`helix.comm.launch`, torchrun or SLURM, never by Lightning's re-execution of the script.
"""

from __future__ import annotations

import signal
import warnings
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

from helix.comm.mesh import Mesh
from helix.partition.grid import Grid


class HelixStrategy(ModelParallelStrategy):
    """A mesh of data x stage x n x m ranks for one LightningModule.

    The module partitions its layers in `configure_model`, where `self.trainer.strategy.mesh` is the mesh.

    Args:
        grid: m feature slices by n head groups.
        data: replicas that work on different samples.
        stage: pipeline stages.

    Raises:
        PartitionError: in `setup_environment`, if the ranks that are running are not data * stage * m * n.
    """

    def __init__(self, grid: Grid, data: int = 1, stage: int = 1) -> None:
        super().__init__(data_parallel_size=data, tensor_parallel_size=grid.ranks)
        self.grid, self.data, self.stage = grid, data, stage
        self._mesh: Mesh | None = None
        self._sigterm: Any = None

    @property
    def mesh(self) -> Mesh:
        """The mesh; exists from `setup_environment` on.

        Raises:
            RuntimeError: before that.
        """
        if self._mesh is None:
            raise RuntimeError("HelixStrategy's mesh exists once the Trainer has set up its processes")
        return self._mesh

    @property
    def device_mesh(self) -> DeviceMesh:
        return self.mesh.device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.mesh.data.size, "rank": self.mesh.data.rank}

    def setup_environment(self) -> None:
        # Not ModelParallelStrategy's own: it would build a data x tensor mesh beside ours.
        self._sigterm = signal.getsignal(signal.SIGTERM)
        # Lightning 2.6 asks torch 2.13's pytree in a deprecated way, on every rank.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        if self._mesh is None:
            self._mesh = Mesh(self.grid, self.data, self.stage, self.root_device.type)

    def _restore_sigterm(self) -> None:
        """Undo Lightning's SIGTERM handler, which broadcasts: a rank that dies with its group must not wait for it.

        Whoever launched this rank decided what SIGTERM does: nothing but end it, or finish the W&B run first.
        """
        signal.signal(signal.SIGTERM, self._sigterm if self._sigterm is not None else signal.SIG_DFL)

    def on_train_start(self) -> None:
        self._restore_sigterm()

    def on_validation_start(self) -> None:
        self._restore_sigterm()

    def on_test_start(self) -> None:
        self._restore_sigterm()

    def on_predict_start(self) -> None:
        self._restore_sigterm()

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        # On CPU Lightning lists as many devices as it was told; which one a rank takes is all the same.
        return self.parallel_devices[self.local_rank % len(self.parallel_devices)]
