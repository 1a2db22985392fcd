"""DeepSpeed-Ulysses: the sequence cut over all ranks, whole heads inside attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from helix.models.experts import load_deepspeed, start_deepspeed
from helix.models.plain import Core, PlainBlock
from helix.parallel.methods.method import Job, Layout
from helix.parallel.methods.sequence import SequenceMethod
from helix.parallel.methods.tensor import by_sequence
from helix.partition.shape import TransformerShape
from helix.partition.transformer_cost import expert_bytes

# q, k, v[B, T@sequence, H, D], dim of the batch -> o[B, T@sequence, H, D]
Distributed = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Ulysses(SequenceMethod):
    """`ulysses16`: an all-to-all each of q, k and v from sequence to heads, and one of o back.

    Rank r has tokens r * T / n and following. Keys and values move unrepeated where there are at least n
    key/value heads, and repeated where there are fewer, as DeepSpeed has its users do. Where n does not divide the
    heads DeepSpeed gives the first ranks one more.

    Raises:
        PartitionError: if the ranks do not divide the length, or are not all ranks of the launch.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout, "Ulysses")
        n, group = layout.grid.n, self.sequence.get_group()
        self.rank = self.sequence.get_local_rank()
        for block in self.model.blocks.values():
            assert isinstance(block, PlainBlock)
            if job.shape.kv_heads >= n:
                block.attention.queries_per_kv = 1  # not repeated before they are sent
            attention = _by_sequence(block.attention.core)
            distributed = distributed_attention(attention, group, job.device.type, even=job.shape.kv_heads % n == 0)
            block.attention.core = _by_heads(distributed)

    def step(self, tokens: Tensor) -> Tensor:
        own = self.job.length // self.layout.grid.n
        positions = torch.arange(self.rank * own, (self.rank + 1) * own, device=tokens.device)
        return self.model(tokens[:, positions], positions)

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        assert output is not None
        parts = [torch.empty_like(output) for _ in range(self.layout.grid.n)]
        dist.all_gather(parts, output.contiguous())
        return torch.cat(parts, dim=1).flatten(0, 1)

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        job, n = self.job, self.layout.grid.n
        tokens = job.batch * job.length // n
        out = Counter({"all_to_all/sequence": all_to_all_bytes(job.shape, n, self.rank, tokens, job.dtype.itemsize)})
        if routes:
            capacities = self.capacities([by_sequence(each, job.batch, n) for each in routes], n, self.rank)
            out += expert_bytes(job.shape, self.layout.ep_size, capacities, job.dtype.itemsize)
        return +out


def all_to_all_bytes(shape: TransformerShape, n: int, rank: int, tokens: int, itemsize: int) -> int:
    """Bytes that `rank` sends in all layers of one forward pass.

    Args:
        tokens: of one rank.
    """
    kv_heads = shape.kv_heads if shape.kv_heads >= n else shape.heads
    own_kv = kv_heads // n + (rank < kv_heads % n)
    own = own_kv * shape.heads // kv_heads
    # q, k and v keep their own heads and send the rest; o keeps the own tokens of the own heads.
    heads = (shape.heads - own) + 2 * (kv_heads - own_kv) + own * (n - 1)
    return shape.layers * tokens * heads * shape.head_dim * itemsize


def distributed_attention(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], group: dist.ProcessGroup, device_type: str, even: bool
) -> Distributed:
    """DeepSpeed's `DistributedAttention` around an attention of [B, T, H, D], on the process group that is running.

    Args:
        even: whether all ranks get the same number of heads.
    """
    load_deepspeed(device_type)
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    start_deepspeed(device_type)
    if not even and groups.mesh_device is None:
        # What `deepspeed.initialize(mesh_param=..)` does. DeepSpeed looks up there how many heads a rank has; by
        # default every rank would take itself for the first.
        names = ("data_parallel", "sequence_parallel")
        groups.mesh_device = deepspeed.comm.initialize_mesh_device((1, dist.get_world_size()), names)
    distributed: Distributed = DistributedAttention(attention, group, scatter_idx=2, gather_idx=1)
    return distributed


def _by_sequence(core: Core) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A core of [B, H, T, D] as one of [B, T, H, D], whose keys and values may be of fewer heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if (repeats := q.shape[1] // k.shape[1]) > 1:
            k, v = (z.repeat_interleave(repeats, dim=1) for z in (k, v))
        return core(q, k, v).transpose(1, 2)

    return attend


def _by_heads(distributed: Distributed) -> Core:
    """DeepSpeed's attention of [B, T, H, D], batch first, as a core of [B, H, T, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return distributed(q, k, v, 0).transpose(1, 2)

    return attend
