"""The experts of the MoE transformer: `deepspeed.moe.layer.MoE`.

8 experts on 16 ranks are EP8 x 2: expert g lies on rank g of each group of eight, and the two groups route
different tokens. The tokens are sharded over all m * n ranks before the router sees them, so that each is
routed once, not once for every rank that holds a copy.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import parametrize

from helix.comm.mesh import Mesh
from helix.comm.observe import observe
from helix.comm.parameters import Work, empty_parameter, fill_normal, local
from helix.comm.record import listening, phase
from helix.comm.stream import Replicated, Sharded, Stream
from helix.models.layers import FeedForward
from helix.partition.shape import check_expert_parallel


class Expert(nn.Module):
    """gelu(x W_up^T) W_down^T. This rank's expert of up[experts@expert, F, E] and down[experts@expert, E, F]."""

    def __init__(self, width: int, hidden: int, mesh: Mesh, ep_size: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        ranks, placements = mesh.experts(ep_size), (Replicate(), Shard(0))
        self.up = empty_parameter((ep_size, hidden, width), ranks, placements, dtype)
        self.down = empty_parameter((ep_size, width, hidden), ranks, placements, dtype)

    def init_weights(self, seed: int, name: str) -> None:
        for key, parameter in self.named_parameters():
            # Only the own expert is drawn: the whole of all experts would be drawn on every rank.
            assert isinstance(parameter, DTensor)
            own = parameter.to_local()[0]
            fill_normal(own, own.shape[1] ** -0.5, seed, f"{name}.{key}")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, local(self.up)[0])), local(self.down)[0])


class _Local(nn.Module):
    """Hands DeepSpeed's router, which computes with plain tensors, the local tensor of a DTensor."""

    def forward(self, weight: Tensor) -> Tensor:
        return local(weight, Work.SHARDED)


class Experts(FeedForward):
    """Top-k routing and `experts` experts over `ep_size` ranks each, on the residual stream.

    No token is dropped, so that the result does not depend on how the tokens lie over the ranks; the exchange
    is as large as the fullest expert of a group needs.

    Attributes:
        auxiliary_loss: load-balancing loss of this rank's tokens in the last forward (GShard).

    Raises:
        PartitionError: if ep_size divides not both the experts and the ranks.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        ep_size: int,
        mesh: Mesh,
        stream: Stream,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_expert_parallel(experts, ep_size, mesh.grid.ranks)
        moe = start_deepspeed(mesh.device_type)
        self.moe = moe(
            width,
            Expert(width, hidden, mesh, ep_size, dtype),
            num_experts=experts,
            ep_size=ep_size,
            k=top_k,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        # DeepSpeed would make its own process groups, by name and for the process; ours belong to the mesh.
        group = mesh.experts(ep_size).get_group("expert")
        self.moe.deepspeed_moe._set_ep_group(group)
        # Dispatch and return; and the fullest expert's count, which the ranks agree on before.
        self._names = {group.group_name: "experts", f"all_reduce/{group.group_name}": "experts.capacity"}
        self.first_expert = mesh.experts(ep_size).get_local_rank("expert") * (experts // ep_size)
        router = self.moe.deepspeed_moe.gate.wg
        router.weight = empty_parameter((experts, width), mesh.weights, (Replicate(), Replicate()), torch.float32)
        parametrize.register_parametrization(router, "weight", _Local(), unsafe=True)
        self.tokens = Sharded(stream.axis)
        self.replicated = isinstance(stream, Replicated)
        self.auxiliary_loss: Tensor | None = None

    @property
    def router_weight(self) -> DTensor:
        """[experts, E] on every rank, in fp32."""
        weight: DTensor = self.moe.deepspeed_moe.gate.wg.parametrizations.weight.original
        return weight

    def init_weights(self, seed: int, name: str) -> None:
        fill_normal(self.router_weight, self.router_weight.shape[1] ** -0.5, seed, f"{name}.router")
        for offset, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            expert.init_weights(seed, f"{name}.experts.{self.first_expert + offset}")

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        if self.replicated:
            x = self.tokens.leave_whole(x, "experts")
        with self._observed(), phase("experts"):
            y, self.auxiliary_loss, _ = self.moe(x)
        return self.tokens.finish(y, shape[0] * shape[1], "experts") if self.replicated else y

    def _observed(self) -> AbstractContextManager[None]:
        """Counts DeepSpeed's collectives of the forward; its backward's go uncounted."""
        return observe(self._names) if listening() else nullcontext()


def load_deepspeed(device_type: str) -> None:
    """Import DeepSpeed, for this kind of device; whoever forks ranks calls it first, so that they share it."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("compilers").setLevel(logging.ERROR)  # setuptools', while DeepSpeed tries what it could build
    import deepspeed.moe.layer

    # DeepSpeed would compile a shared-memory all-reduce (a minute, at first use) that routing never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start_deepspeed(device_type: str) -> Any:
    """DeepSpeed's MoE class, on the process group that is running."""
    load_deepspeed(device_type)
    import deepspeed
    from deepspeed.moe.layer import MoE

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("nccl" if device_type == "cuda" else "gloo", verbose=False)
    return MoE
