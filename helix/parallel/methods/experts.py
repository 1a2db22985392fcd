"""The experts of the rivals that partition a model: DeepSpeed-MoE too, so that a comparison compares the rest."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from helix.comm.mesh import Mesh
from helix.comm.stream import Replicated, Sharded
from helix.models.experts import Experts
from helix.parallel.methods.method import Job


class _Experts(nn.Module):
    """`Experts` on x[B, T, E] instead of the residual stream."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def init_weights(self, seed: int, name: str) -> None:
        self.experts.init_weights(seed, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x.flatten(0, 1), (x.shape[0], x.shape[1])).view_as(x)


def expert_layers(job: Job, mesh: Mesh, ep_size: int, sharded: bool) -> Callable[[], nn.Module] | None:
    """What makes each block's experts, for `PlainTransformer`; None for a dense model, which has its own MLP.

    Args:
        mesh: whose m * n ranks share the experts.
        ep_size: ranks that hold one set of experts.
        sharded: whether each rank's x[B, T, E] are tokens of its own, or the same on all of them.
    """
    shape = job.shape
    if not shape.experts:
        return None
    stream = Sharded(mesh.model) if sharded else Replicated(mesh.model)

    def make() -> nn.Module:
        args = (shape.width, shape.mlp_hidden, shape.experts, shape.top_k, ep_size, mesh, stream, job.dtype)
        return _Experts(Experts(*args))

    return make
