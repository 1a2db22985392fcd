"""The single-device answer that a method's logits are held against."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from helix.checkpoint.agree import from_rank_0
from helix.models.reference import Reference
from helix.parallel.methods.method import Job
from helix.partition.function import Function
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions


def name_of(function: Function) -> str:
    """What a report calls the model that computes it."""
    return "mha_fp32_single" if function.slices == 1 else "mha_narrow_heads"


class Oracle:
    """Answers of the single-device model to one batch, computed on rank 0 in fp32 or the job's wider dtype.

    Args:
        tokens: [B, T].
    """

    def __init__(self, job: Job, tokens: Tensor) -> None:
        self.job, self.tokens = job, tokens
        self._answers: dict[Function, tuple[Tensor | None, list[Tensor]]] = {}

    def answer(self, function: Function) -> tuple[Tensor | None, list[Tensor]]:
        """The logits[B * T, V], on rank 0 only, and every layer's routes[B * T, top_k]. All ranks call it.

        Raises:
            CheckpointError: on every rank, if the weights cannot be read.
        """
        if function not in self._answers:
            own: list[Tensor] = []

            def compute() -> list[Tensor]:
                logits, routes = self._compute(function)
                own.append(logits)
                return routes

            routes = from_rank_0(compute)
            self._answers[function] = (own[0] if own else None, routes)
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
        self.job.fill(model)
        logits = model(self.tokens)
        torch.set_num_threads(threads)
        return logits, model.routes


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected, in fp64."""
    difference = value.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
