"""The whole model in one process, on all of the machine's cores or on one GPU."""

from __future__ import annotations

import os
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from helix.models.plain import PlainTransformer
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition import rivals


class Single(Method):
    """`single`: rank 0 computes, the other ranks of the launch wait. Its experts are plain PyTorch."""

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout)
        self.model: PlainTransformer | None = None
        self.idle_ranks = dist.get_world_size() - 1
        if dist.get_rank() == 0:
            with job.device:
                self.model = PlainTransformer(job.shape, job.dtype)
                job.fill(self.model)

    def step(self, tokens: Tensor) -> Tensor | None:
        if self.model is None:
            return None
        threads = torch.get_num_threads()
        # Each rank has its share of the cores; while this one computes, the others sleep.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            return self.model(tokens)
        finally:
            torch.set_num_threads(threads)

    def whole_logits(self, output: Tensor | None) -> Tensor | None:
        return None if output is None else output.flatten(0, 1)

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        return Counter()

    def predicted_weight_bytes(self) -> int:
        return rivals.replica_weight_bytes(self.job.shape, self.job.dtype.itemsize) if self.model else 0
