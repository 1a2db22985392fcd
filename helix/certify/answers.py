"""Inputs of one attention layer, and the single device's answer to them in fp64; each rank's part of the answer.

Every number drawn is exact in fp64, fp32, bf16 and fp16 alike, so one answer serves all precisions, and what a run
differs by is rounding of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.attention.oracle import attention_oracle, block_weights
from helix.certify.bounds import scales
from helix.certify.cases import Subject
from helix.partition.function import Function
from helix.partition.grid import Grid

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Answer:
    """What one device makes of the inputs.

    Args:
        x, y: [N, E], the input and the output.
        grad: [N, E], the output's gradient that goes back.
        weights: whole, by name.
        gradients: of x and of every weight.
        scales: of every gradient, what a deviation is relative to.
    """

    x: Tensor
    y: Tensor
    grad: Tensor
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    scales: dict[str, float]


def exact(values: Tensor) -> Tensor:
    """The nearest numbers that all four dtypes have, or nearly, in fp64."""
    return values.bfloat16().half().double()


class Answers:
    """The oracle's answers, each computed when it is first asked for."""

    def __init__(self, subject: Subject, seed: int, device: torch.device) -> None:
        self.subject, self.seed, self.device = subject, seed, device
        self._known: dict[tuple[Function, float], Answer] = {}

    def of(self, function: Function, queries: float = 1.0) -> Answer:
        """The answer, with queries so many times their usual size."""
        if (function, queries) not in self._known:
            self._known[function, queries] = self._answer(function, queries)
        return self._known[function, queries]

    @torch.enable_grad()
    def _answer(self, function: Function, queries: float) -> Answer:
        subject, shape = self.subject, self.subject.shape
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return exact(torch.randn(size, generator=generator) * std + mean).to(self.device)

        weights = self._weights(function, draw)
        weights["q_norm" if shape.qk_norm else "wq"] *= queries
        weights = {name: w.requires_grad_() for name, w in weights.items()}
        x = draw(subject.batch, subject.length, shape.width).requires_grad_()
        grad = draw(subject.batch, subject.length, shape.width)
        dense = dict(weights)
        if function.block is not None:
            m, n = function.block.m, function.block.n
            dense |= {name: block_weights(weights[name], shape.heads, m, n) for name in ("wq", "wk", "wv")}
        y = attention_oracle(x, **dense, causal=shape.causal, rope=shape.rope, slices=function.slices)
        found = torch.autograd.grad(y, [x, *weights.values()], grad)
        gradients = dict(zip(("x", *weights), (found[0].flatten(0, 1), *found[1:]), strict=True))
        held = scales({name: float(each.abs().max()) for name, each in gradients.items()}, shape.heads)
        wholes = {name: w.detach() for name, w in weights.items()}
        flat = (x.detach().flatten(0, 1), y.detach().flatten(0, 1), grad.flatten(0, 1))
        return Answer(*flat, wholes, gradients, held)

    def _weights(self, function: Function, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        shape, layout = self.subject.shape, self.subject.shape.layout
        head = (layout.parts, layout.head_dim // layout.parts)
        columns = shape.width // function.block.ranks if function.block else shape.width
        counts = (("wq", shape.heads), ("wk", shape.kv_heads), ("wv", shape.kv_heads))
        weights = {name: draw(count, *head, columns, std=columns**-0.5) for name, count in counts}
        if function.projects:
            weights["wo"] = draw(shape.width, shape.heads, *head, std=shape.attention_width**-0.5)
        if shape.qk_norm:  # not ones, which would not show a norm that is left out
            weights |= {name: draw(*head, std=0.25, mean=1.0) for name in NORMS}
        return weights


def own_part(name: str, whole: Tensor, subject: Subject, rank: int) -> Tensor:
    """Of a whole parameter of attention what `Grid` says that a rank owns, whatever its DTensor believes.

    Args:
        name: wq, wk, wv, wo, q_norm or k_norm.
    """
    grid: Grid = subject.grid
    group, feature_slice = grid.coordinates(rank)
    features = torch.tensor(grid.owned_features(subject.shape.layout, feature_slice), device=whole.device)
    if name in NORMS:
        return whole.flatten()[features].view(whole.shape[0], -1)
    dim = 1 if name == "wo" else 0  # wo[E, H, P, D/P], the others [H or K, P, D/P, E]
    heads = grid.owned_heads(whole.shape[dim], group)
    own = whole.flatten(dim + 1, dim + 2).narrow(dim, heads.start, len(heads)).index_select(dim + 1, features)
    return own.unflatten(dim + 1, (subject.shape.layout.parts, -1))


def deviation(value: Tensor | None, expected: Tensor, scale: float) -> float:
    """The largest deviation, relative to `scale`; infinite for another shape or none, or where there is no number."""
    if value is None or value.shape != expected.shape:
        return float("inf")
    if not value.numel():
        return 0.0
    worst = float((value.detach().double() - expected).abs().max())
    return worst / scale if worst < float("inf") and scale > 0 else (0.0 if worst == 0 else float("inf"))
