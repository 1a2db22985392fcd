"""What a configuration asks of the methods: layouts and dtypes."""

from __future__ import annotations

import torch

from helix.config.schema import (
    ITEMSIZE,
    InferConfig,
    ParallelConfig,
    expert_parallel,
    to_grid,
    to_options,
    to_shape,
)
from helix.parallel.methods.method import Layout
from helix.partition.cost import cheapest_schedule

DTYPES = {"64-true": torch.float64, "32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def resolve(settings: InferConfig, parallel: ParallelConfig) -> Layout:
    """A method's layout, with Helix's `auto` resolved for this batch and length."""
    model, work = settings.model, settings.workload
    schedule = parallel.schedule
    if parallel.method == "helix" and schedule == "auto":
        schedule = cheapest_schedule(
            to_shape(model).layout,
            to_grid(parallel),
            max(1, work.batch_size // parallel.data),  # too few samples are refused when the model is built
            work.seq_len,
            model.causal,
            ITEMSIZE[settings.precision],
        )
    options = to_options(parallel, schedule)
    ep_size = expert_parallel(model, parallel)
    return Layout(to_grid(parallel), parallel.data, parallel.stage, options, ep_size, parallel.microbatches)
