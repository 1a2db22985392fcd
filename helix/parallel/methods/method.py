"""What a method of laying a model over ranks has to offer to be measured beside the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape


@dataclass(frozen=True)
class Job:
    """The model and the workload, the same for every method of a launch.

    Args:
        shape: the model's dims.
        batch, length: B and T of one step over all ranks.
        dtype, device: of parameters and activations; device is this rank's.
        seed: of the weights; every method draws the same ones.
    """

    shape: TransformerShape
    batch: int
    length: int
    dtype: torch.dtype
    device: torch.device
    seed: int


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
        axes: name of each process group that the method's own libraries communicate over, by `group.group_name`;
            for counting (`helix.comm.observe`).
    """

    model: nn.Module | None
    idle_ranks: int = 0
    axes: dict[str, str]

    def __init__(self, job: Job, layout: Layout) -> None:
        self.job, self.layout, self.axes = job, layout, {}

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

    def predicted(self, routes: list[Tensor]) -> Counter[str] | None:
        """Closed form of the bytes that this rank sends in one step, by "collective/axis"; None if there is none.

        Args:
            routes: for each layer with experts, the experts of each token, [B * T, top_k].
        """
        return None

    def predicted_weight_bytes(self) -> int | None:
        """Closed form of the bytes of this rank's parameters; None if there is none."""
        return None

    def expected_logits(self, tokens: Tensor) -> Tensor | None:
        """On rank 0, [B * T, V] of the same model on one device, where it is not the function of the others."""
        return None
