"""The single-device answer that a method's logits are held against."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helix.models.reference import Reference
from helix.parallel.methods.method import Job, Layout
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions


@dataclass(frozen=True)
class Function:
    """Which function a layout computes: all exact ones are the same, wherever they run.

    Args:
        slices: m where `perslice` computes attention with heads * m narrow heads, else 1.
        block: the grid whose block-diagonal projections are meant literally, else None.
        projects: whether there is a W_O.
    """

    slices: int = 1
    block: Grid | None = None
    projects: bool = True

    @property
    def reference(self) -> str:
        return "mha_fp32_single" if self.slices == 1 else "mha_narrow_heads"


def function_of(layout: Layout) -> Function:
    options = layout.options
    return Function(
        slices=layout.grid.m if options.schedule == "perslice" else 1,
        block=layout.grid if options.projection == "block" else None,
        projects=options.aggregate == "project",
    )


class Oracle:
    """Answers of the single-device model to one batch, computed on rank 0 in fp32 or the job's wider dtype.

    Args:
        tokens: [B, T].
    """

    def __init__(self, job: Job, tokens: Tensor) -> None:
        self.job, self.tokens = job, tokens
        self._answers: dict[Function, tuple[Tensor | None, list[Tensor]]] = {}

    def answer(self, function: Function) -> tuple[Tensor | None, list[Tensor]]:
        """The logits[B * T, V], on rank 0 only, and every layer's routes[B * T, top_k]. All ranks call it."""
        if function not in self._answers:
            logits, routes = self._compute(function) if dist.get_rank() == 0 else (None, [])
            shared = [routes]
            dist.broadcast_object_list(shared)
            self._answers[function] = (logits, shared[0])
        return self._answers[function]

    @torch.inference_mode()
    def _compute(self, function: Function) -> tuple[Tensor, list[Tensor]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # the other ranks are waiting
        grid = function.block or Grid(function.slices, 1)
        options = AttentionOptions(
            aggregate="project" if function.projects else "concat",
            projection="block" if function.block else "column",
        )
        dtype = torch.promote_types(self.job.dtype, torch.float32)
        model = Reference(self.job.shape, grid, options, narrow=function.slices > 1, dtype=dtype)
        model.init_weights(self.job.seed)
        logits = model(self.tokens)
        torch.set_num_threads(threads)
        return logits, model.routes


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected, in fp64."""
    difference = value.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
