"""The ways to run a pretrained model on the ranks of a launch: Helix's, transformers' own, and one process."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helix.comm.mesh import Mesh
from helix.comm.observe import observe
from helix.config.generation import to_phases
from helix.config.schema import ParallelConfig, to_grid
from helix.partition.grid import PartitionError
from helix.pretrained.folder import ONLY_DATA
from helix.pretrained.loading import load
from helix.study.trial import local_bytes


@dataclass(frozen=True)
class Source:
    """A pretrained model as it is loaded: from where, in which precision, to which device of this rank."""

    folder: Path
    dtype: torch.dtype
    device: torch.device


class Contender(ABC):
    """One model on the ranks of this launch. All ranks construct it, and call each of its methods, together.

    Attributes:
        model: this rank's part; None on a rank that has none.
        idle_ranks: ranks of the launch that it has no work for.
        axes: see `helix.parallel.methods.method.Method`.
    """

    model: PreTrainedModel | None
    idle_ranks: int = 0
    axes: dict[str, str]

    def __init__(self) -> None:
        self.axes = {}

    def observed(self) -> AbstractContextManager[None]:
        """While inside, the collectives of other libraries are counted too, if it uses any."""
        return observe(self.axes) if self.axes else nullcontext()

    def computing(self) -> AbstractContextManager[None]:
        """Around what it computes."""
        return nullcontext()

    def weight_bytes(self) -> int:
        """Of this rank's parameters, tied ones once."""
        return 0 if self.model is None else sum(local_bytes(each) for each in self.model.parameters())


class Partitioned(Contender):
    """Helix's: weights and cache cut over m x n ranks."""

    def __init__(self, source: Source, parallel: ParallelConfig) -> None:
        super().__init__()
        mesh = Mesh(to_grid(parallel), device_type=source.device.type)
        self.model = load(source.folder, mesh, source.dtype, to_phases(parallel))


class Alone(Contender):
    """transformers in one process, rank 0, with all of the machine's cores; the other ranks wait."""

    def __init__(self, source: Source, parallel: ParallelConfig) -> None:
        super().__init__()
        self.idle_ranks = dist.get_world_size() - 1
        self.model = None
        if dist.get_rank() == 0:
            self.model = whole_model(source)

    @contextmanager
    def computing(self) -> Iterator[None]:
        if self.model is None:
            yield
            return
        with all_cores():
            yield


class TransformersParallel(Contender):
    """transformers' own tensor parallelism over all ranks of the launch."""

    def __init__(self, source: Source, parallel: ParallelConfig) -> None:
        super().__init__()
        from transformers.distributed import DistributedConfig

        ranks, running = parallel.n, dist.get_world_size()
        if ranks != running:
            raise PartitionError(
                f"transformers' tensor parallelism of {ranks} needs a launch of {ranks}, not {running}"
            )
        plan = DistributedConfig(tp_size=ranks, tp_plan="auto")
        self.model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=source.dtype, distributed_config=plan, use_safetensors=True, **ONLY_DATA
        ).eval()
        mesh: Any = self.model._device_mesh
        self.axes = {mesh.get_group("tp").group_name: "tensor"} if ranks > 1 else {}


_KINDS: dict[str, type[Partitioned | Alone | TransformersParallel]] = {
    "helix": Partitioned,
    "single": Alone,
    "transformers": TransformersParallel,
}


def contender(source: Source, parallel: ParallelConfig) -> Contender:
    """The method of a layout, with the source's weights.

    Raises:
        Exception: the method's own, if it cannot run this model.
    """
    return _KINDS[parallel.method](source, parallel)


def whole_model(source: Source) -> PreTrainedModel:
    """transformers' plain model, all of it in this process."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=source.dtype, use_safetensors=True, **ONLY_DATA
    )
    return model.to(source.device).eval()  # type: ignore[arg-type]


@contextmanager
def all_cores() -> Iterator[None]:
    """While inside, this rank computes on all of the machine's cores; the others sleep meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cache_bytes(cache: Any) -> int:
    """Of the keys and values that this rank has cached."""
    tensors = (getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values"))
    return sum(local_bytes(each) for each in tensors if isinstance(each, Tensor))
