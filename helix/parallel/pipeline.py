"""GPipe in training: a stage's forwards and backwards of all microbatches as one node of the autograd graph.

    stage 0   F0 F1 F2 F3  .  |  .  B0 B1 B2 B3
    stage 1   .  F0 F1 F2 F3  |  B0 B1 B2 B3  .

    F   receive the stream x from the stage before, compute, send the result to the next
    |   the losses, which the last stage has, become every stage's: an ordinary tensor with a gradient
    B   receive the result's gradient from the stage after, go backward, send x's gradient to the one before

So whoever trains sees a loss and calls `backward` on it when he likes, scaled as he likes, as often as he
accumulates: Lightning's automatic optimisation, HelixPrecision's loss scale and the validation need not know of
stages. That is also why it is not `torch.distributed.pipelining`, which the inference method runs: its schedules do
forward and backward in one call, before which Lightning would have to have zeroed the gradients, and in which nothing
can scale the loss by what is known outside. And not a differentiable send and receive for each microbatch: every
stage's autograd engine would then have to come to the microbatches' backwards in one order, which nobody promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helix.comm import transport
from helix.comm.mesh import Axis
from helix.comm.point_to_point import receive, send

# (x, targets[B, T]) -> the stream, or on the last stage the loss of each token [B * T]. x is the stream, or
# tokens[B, T] on the first stage.
Part = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stream:
    """What moves between stages: x[B, T / shards, width].

    Args:
        shards: ranks that cut it over the sequence.
    """

    width: int
    shards: int
    dtype: torch.dtype


@dataclass
class _Microbatch:
    x: Tensor
    y: Tensor
    balance: Tensor | None = None


class Pipeline:
    """A stage of a GPipe pipeline.

    Args:
        part: this stage's part of the model.
        stream: the same on every stage.
        axis: the stages.
        microbatches: they divide the samples of a batch.
        balances: after all forwards, a scalar of each microbatch that adds to the loss; None without.
    """

    def __init__(
        self,
        part: Part,
        stream: Stream,
        axis: Axis,
        microbatches: int,
        balances: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        self.part, self.stream, self.axis, self.microbatches, self.balances = (
            part,
            stream,
            axis,
            microbatches,
            balances,
        )
        self.first, self.last = axis.rank == 0, axis.rank == axis.size - 1

    def __call__(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens, targets[B, T], the same on every stage -> the loss of each token [B * T], and this stage's balance.

        The losses are the same on all stages; so must be what is made of them, whose gradient comes back.
        """
        if not torch.is_grad_enabled():
            return self.losses(self.forward(tokens, targets), targets), None
        # A node of the graph has an input that wants a gradient; the weights are not its inputs.
        losses, balance = _Node.apply(torch.zeros((), device=tokens.device, requires_grad=True), self, tokens, targets)
        return losses, None if self.balances is None else balance

    def forward(self, tokens: Tensor, targets: Tensor) -> list[_Microbatch]:
        """All forwards."""
        done, sent = [], []
        learns = torch.is_grad_enabled()
        for own, wanted in zip(tokens.chunk(self.microbatches), targets.chunk(self.microbatches), strict=True):
            x = own if self.first else self._receive(own).requires_grad_(learns)
            y = self.part(x, wanted)
            done.append(_Microbatch(x, y))
            if not self.last:
                assert y.dtype == self.stream.dtype
                sent.append(send(y.detach(), self.axis, self.axis.rank + 1, "pipeline"))
        if learns and self.balances is not None:
            for each, balance in zip(done, self.balances(), strict=True):
                each.balance = balance
        for sending in sent:
            sending.wait()
        return done

    def losses(self, done: list[_Microbatch], targets: Tensor) -> Tensor:
        """The last stage's losses [B * T], on every stage."""
        if self.last:
            own = torch.cat([each.y.detach() for each in done])
        else:
            wide = torch.promote_types(self.stream.dtype, torch.float32)
            own = torch.zeros(targets.numel(), dtype=wide, device=targets.device)
        return transport.all_reduce(own, self.axis, "pipeline.losses")

    def backward(self, done: list[_Microbatch], of_losses: Tensor, of_balance: Tensor) -> None:
        """All backwards: gradients are added to the parameters'."""
        sent = []
        for each, of_own in zip(done, of_losses.chunk(self.microbatches), strict=True):
            of_y = of_own if self.last else self._like(each.y, self.axis.rank + 1)
            outputs, gradients = [each.y], [of_y]
            if each.balance is not None:
                outputs.append(each.balance)
                gradients.append(of_balance)
            torch.autograd.backward(outputs, gradients)
            if not self.first:
                assert each.x.grad is not None
                sent.append(send(each.x.grad, self.axis, self.axis.rank - 1, "pipeline.grad"))
        for sending in sent:
            sending.wait()

    def _receive(self, tokens: Tensor) -> Tensor:
        shape = (tokens.shape[0], tokens.shape[1] // self.stream.shards, self.stream.width)
        return receive(shape, self.stream.dtype, tokens.device, self.axis, self.axis.rank - 1, "pipeline")

    def _like(self, y: Tensor, of: int) -> Tensor:
        return receive(y.shape, y.dtype, y.device, self.axis, of, "pipeline.grad")


class _Node(torch.autograd.Function):
    """`Pipeline.forward`, and `Pipeline.backward` when the losses' gradient is there."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, pipeline: Pipeline, tokens: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            ctx.done = pipeline.forward(tokens, targets)
        ctx.pipeline = pipeline
        losses = pipeline.losses(ctx.done, targets)
        balance = sum((each.balance.detach() for each in ctx.done if each.balance is not None), losses.new_zeros(()))
        return losses, balance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        done, ctx.done = ctx.done, []
        ctx.pipeline.backward(done, *grads)
        return None, None, None, None
