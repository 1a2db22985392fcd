"""`HelixStrategy`: what Lightning needs to run a module whose layers are partitioned.

    class Lit(LightningModule):
        def configure_model(self):  # Lightning calls it before each of fit, validate, test and predict
            if hasattr(self, "model"):
                return
            self.model = Transformer(shape, self.trainer.strategy.mesh, options)

    Trainer(strategy=HelixStrategy(Grid(m=4, n=4)), devices=16, ..).fit(Lit(), loader)

It provides processes, process group, mesh, precision and the reduction of gradients. The mathematics is the
layers'; ranks are started by `helix.ranks.launch`, torchrun or SLURM, never by Lightning's re-execution of the
script.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from helix.comm.mesh import Mesh
from helix.parallel.precision import HelixPrecision, check_precision
from helix.parallel.scaler import LossScaler, make_scaler
from helix.parallel.shard_data import shard_over_data
from helix.partition.grid import Grid

# What Lightning makes of Trainer(precision=..) under a strategy that it does not know.
_LIGHTNINGS_OWN = (Precision, HalfPrecision, DoublePrecision, MixedPrecision)


class RunningRanks(TorchElasticEnvironment):
    """Ranks whose process group runs already, whoever has started them.

    `helix.launch` keeps torchrun's variables true to it, under SLURM as well: Lightning's own environment for that
    knows a process by srun's number, and `parallel.placement` gives it another.
    """

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Hosts need not have equally many ranks, as Lightning wants."""


class HelixStrategy(ModelParallelStrategy):
    """A mesh of data x stage x n x m ranks for one LightningModule.

    The module partitions its layers in `configure_model`, where `self.trainer.strategy.mesh` is the mesh. All ranks
    of a replica get the same batch; their losses are the same, or at least their gradients sum as
    `helix.comm.parameters.local` says. Parameters that are no DTensors count as replicated, with the same work on
    every rank of a replica.

    Args:
        grid: m feature slices by n head groups.
        data: replicas that work on different samples.
        stage: pipeline stages.
        precision: a key of `helix.parallel.precision.DTYPES`. Trainer(precision=..) does as well, but Lightning
            refuses 64-true and 16-mixed there.
        shard_data: shard parameters, gradients and optimizer state over the data replicas as well
            (`helix.parallel.shard_data`).
        scaling: how 16-mixed scales the loss, "adaptive" to the grid or "ordinary" (`helix.parallel.scaler`).

    Raises:
        PartitionError: in `setup_environment`, if the ranks that are running are not data * stage * m * n.
        ValueError: if precision or scaling is not known; when the Trainer is made, if its precision is another, or if
            it is told of several ranks and nobody has started them.
    """

    def __init__(
        self,
        grid: Grid,
        data: int = 1,
        stage: int = 1,
        precision: str = "32-true",
        shard_data: bool = False,
        scaling: str = "adaptive",
    ) -> None:
        check_precision(precision)
        make_scaler(grid, scaling)
        super().__init__(data_parallel_size=data, tensor_parallel_size=grid.ranks)
        self.grid, self.data, self.stage = grid, data, stage
        self.precision, self.shard_data, self.scaling = precision, shard_data, scaling
        self._mesh: Mesh | None = None
        self._sigterm: Any = None
        if dist.is_initialized():
            self.cluster_environment = RunningRanks()

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Put `HelixPrecision` in the place of what the Trainer brings.

        Raises:
            ValueError: if the Trainer was asked for another precision than the strategy, or for its own plugin.
        """
        if plugin is None or isinstance(plugin, HelixPrecision):
            self._precision_plugin = plugin
            return
        if type(plugin) not in _LIGHTNINGS_OWN:
            raise ValueError(f"HelixStrategy brings its own precision plugin: give it precision=, not {plugin!r}")
        asked = str(plugin.precision)
        # 32-true is also what the Trainer says when it was not asked.
        if asked != "32-true" and self.precision not in ("32-true", asked):
            raise ValueError(f"Trainer(precision={asked}) and HelixStrategy(precision={self.precision}) disagree")
        precision = self.precision if asked == "32-true" else asked
        scaler: LossScaler | None = make_scaler(self.grid, self.scaling) if precision == "16-mixed" else None
        self._precision_plugin = HelixPrecision(precision, scaler)

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

    def _configure_launcher(self) -> None:
        """Leave the launcher away: Lightning's would run the user's script again for each rank."""
        assert self.cluster_environment is not None
        ranks = self.num_processes * self.num_nodes
        if ranks > 1 and not self.cluster_environment.creates_processes_externally:
            raise ValueError(
                f"HelixStrategy starts no processes, and nobody has started the {ranks} that the Trainer has devices "
                "for: start them with helix.launch, torchrun or SLURM"
            )

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
        assert isinstance(self.precision_plugin, HelixPrecision)
        self.precision_plugin.mesh = self._mesh

    def model_to_device(self) -> None:
        super().model_to_device()
        if self.shard_data and self.mesh.data.size > 1:
            assert self.lightning_module is not None
            shard_over_data(self.lightning_module, self.mesh)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """While micro-batches accumulate: no reduce-scatter of what is sharded over data; nothing else has any."""
        assert self.lightning_module is not None
        units = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce what `self.log(.., sync_dist=True)` logs over the data replicas, unless a group is given.

        Not over the world, as Lightning would: the ranks of a replica hold one value m * n times, and a sum would
        count it as often.
        """
        if group is None:
            if self.mesh.data.size == 1:
                return tensor
            group = self.mesh.data.group
        return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decide for every rank at once, not for the data replicas only."""
        votes = torch.tensor(int(decision), device=self.root_device)
        votes = self.reduce(votes, dist.group.WORLD, "sum")
        return int(votes) == dist.get_world_size() if all else bool(votes)

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
