"""PyTorch's own context parallelism: the weights on every rank, the sequence cut over all of them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard

from helix.comm.mesh import Mesh
from helix.models.plain import PlainTransformer
from helix.parallel.methods.experts import expert_layers
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition import rivals, wire
from helix.partition.grid import Grid, PartitionError


class ContextParallel(Method):
    """`cp16`. Keys and values go round (PyTorch's default: one all-gather), partial results are merged.

    Where 2n divides the length PyTorch deals each rank one chunk from the sequence's head and one from its tail, so
    that a causal mask costs all ranks the same. PyTorch replaces `scaled_dot_product_attention` within the step,
    for the flash, memory-efficient and cuDNN kernels of CUDA; on a CPU its own error says that there is no kernel.

    Raises:
        PartitionError: if the ranks do not divide the length, or are not all ranks of the launch.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout)
        n = layout.grid.n
        if job.length % n:
            raise PartitionError(
                f"context parallelism over {n} ranks needs a length that they divide, not {job.length}"
            )
        self.ranks = Mesh(Grid(1, n), device_type=job.device.type)
        self.sequence = self.ranks.flat
        self.axes = {self.sequence.get_group().group_name: "sequence"}
        with job.device:
            experts = expert_layers(job, self.ranks, layout.ep_size, sharded=True)
            self.model: PlainTransformer = PlainTransformer(job.shape, job.dtype, experts).eval()
            self.model.init_weights(job.seed)

    def step(self, tokens: Tensor) -> Tensor:
        # PyTorch cuts these in place to the rank's own share, in whatever order it deals them.
        own, positions = tokens.clone(), torch.arange(tokens.shape[1], device=tokens.device)
        buffers, dims = [own, positions], [1, 0]
        with context_parallel(self.sequence, buffers=buffers, buffer_seq_dims=dims, no_restore_buffers={*buffers}):
            return self.model(own, positions)

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        assert output is not None
        (logits,) = context_parallel_unshard(self.sequence, [output], [1])
        return logits.flatten(0, 1)

    def predicted(self, routes: list[Tensor]) -> Counter[str] | None:
        """One all-gather of keys and values, repeated to the number of heads, in each layer.

        None for heads that a kernel of CUDA pads, or with tokens dealt in another order than experts are counted in.
        """
        job, n = self.job, self.layout.grid.n
        if job.shape.head_dim % 8 or routes:
            return None
        shard = 2 * job.batch * job.length // n * job.shape.attention_width
        gathered = wire.all_gather(shard, n, job.dtype.itemsize)
        return +Counter({"all_gather/sequence": job.shape.layers * gathered})

    def predicted_weight_bytes(self) -> int:
        return rivals.replica_weight_bytes(self.job.shape, self.job.dtype.itemsize, self.layout.ep_size)
