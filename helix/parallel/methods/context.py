"""PyTorch's own context parallelism."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard

from helix.parallel.methods.method import Job, Layout
from helix.parallel.methods.sequence import SequenceMethod
from helix.partition import wire


class ContextParallel(SequenceMethod):
    """`cp16`. Keys and values go round (PyTorch's default: one all-gather), partial results are merged.

    Where 2n divides the length PyTorch deals each rank one chunk from the sequence's head and one from its tail, so
    that a causal mask costs all ranks the same. PyTorch replaces `scaled_dot_product_attention` within the step,
    for the flash, memory-efficient and cuDNN kernels of CUDA; on a CPU its own error says that there is no kernel.

    Raises:
        PartitionError: if the ranks do not divide the length, or are not all ranks of the launch.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout, "context parallelism")

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
