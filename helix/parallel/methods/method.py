"""What a method of laying a model over ranks has to offer to be measured beside the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helix.checkpoint.restoring import Opened
from helix.comm.mesh import Mesh
from helix.comm.observe import observe
from helix.models.plain import PlainTransformer
from helix.models.reference import Reference
from helix.models.transformer import Transformer
from helix.partition.between_hosts import Pairs
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import expert_capacity


@dataclass(frozen=True)
class Job:
    """The model and the workload, the same for every method of a launch.

    Args:
        shape: the model's dims.
        batch, length: B and T of one step over all ranks.
        dtype, device: of parameters and activations; device is this rank's.
        seed: of the weights; every method draws the same ones.
        weights: a checkpoint to take them from instead.
    """

    shape: TransformerShape
    batch: int
    length: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    weights: Opened | None = None

    def fill(self, model: PlainTransformer | Reference | Transformer) -> None:
        """Give a model its weights: a partitioned one its part of them. Moves nothing.

        Raises:
            CheckpointError: if they are of another model, or were trained as another function of it.
        """
        if self.weights is None:
            model.init_weights(self.seed)
        else:
            self.weights.fill(model)


@dataclass(frozen=True)
class Layout:
    """How a method lays the model over all ranks of the launch: data x stage x m x n of them.

    Args:
        grid: m slices x n head groups; for other methods than Helix m is 1 and n the ranks of one replica's stage.
        data: replicas that work on different samples.
        stage: pipeline stages.
        options: Helix's options, the schedule resolved; `residual` also says whether tensor parallelism cuts the
            stream over the sequence.
        ep_size: ranks that share one set of experts.
        microbatches: of one step of a pipeline.
    """

    grid: Grid
    data: int = 1
    stage: int = 1
    options: AttentionOptions = field(default_factory=AttentionOptions)
    ep_size: int = 1
    microbatches: int = 4


class Method(ABC):
    """One model on the ranks of this launch. All ranks construct it, and call each of its methods, together.

    The constructor builds and fills this rank's part, and raises what the method itself raises if it cannot:
    that error becomes the method's row in the table.

    Attributes:
        model: this rank's part; None on a rank that has none.
        idle_ranks: ranks of the launch that the method has no work for.
        bubble: closed form of the share of a step in which a pipeline's stage has nothing to do; None without one.
        axes: name of each process group that the method's own libraries communicate over, by `group.group_name`;
            for counting; empty if they communicate through Helix only.
    """

    model: nn.Module | None
    idle_ranks: int = 0
    bubble: float | None = None
    axes: dict[str, str]

    def __init__(self, job: Job, layout: Layout) -> None:
        self.job, self.layout, self.axes = job, layout, {}

    def mesh(self) -> Mesh:
        """A mesh of the layout's axes. All ranks of the launch have a place in it."""
        return Mesh(self.layout.grid, self.layout.data, self.layout.stage, self.job.device.type)

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor | None:
        """One forward pass.

        Args:
            tokens: [B, T], the whole batch, the same on every rank.

        Returns:
            This rank's share of the logits, in the method's own layout; None on a rank that has none.
        """

    @abstractmethod
    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        """What `step` returned -> [B * T, V] on rank 0 (others may get it too, or None). For comparing."""

    def gather(self, part: Tensor | None) -> Tensor | None:
        """Joins on rank 0, by rank, the logits[N, V] of those ranks that give any; for `whole_logits`."""
        parts: list[Tensor | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(None if part is None else part.cpu(), parts)
        return None if parts is None else torch.cat([each for each in parts if each is not None])

    def observed(self) -> AbstractContextManager[None]:
        """While inside, the collectives of the method's own libraries are counted too, if it has any."""
        return observe(self.axes) if self.axes else nullcontext()

    def capacities(self, routes: list[Tensor], ranks: int, rank: int) -> list[int]:
        """Rows of the fullest expert in this rank's expert group, for each layer or other unit of `routes`.

        Args:
            routes: of each, the experts of each token, [N, top_k], in the order in which `ranks` ranks share them.
        """
        experts, ep_size = self.job.shape.experts, self.layout.ep_size
        found = []
        for each in routes:
            tokens_per_shard = -(-len(each) // ranks)
            found.append(expert_capacity(each.tolist(), experts, ranks, ep_size, tokens_per_shard)[rank // ep_size])
        return found

    def predicted(self, routes: list[Tensor]) -> Counter[str] | None:
        """Closed form of the bytes that this rank sends in one step, by "collective/axis"; None if there is none.

        Args:
            routes: for each layer with experts, the experts of each token, [B * T, top_k].
        """
        return None

    def predicted_between(self, routes: list[Tensor], hosts: Sequence[int]) -> dict[str, Pairs] | None:
        """Closed form of what all ranks send to other hosts in one step, by "collective/axis"; None if there is none.

        Args:
            routes: as `predicted`'s.
            hosts: of each rank.
        """
        return None

    def predicted_weight_bytes(self) -> int | None:
        """Closed form of the bytes of this rank's parameters; None if there is none."""
        return None

    def expected_logits(self, tokens: Tensor) -> Tensor | None:
        """On rank 0, [B * T, V] of the same model on one device, where it is not the function of the others."""
        return None
