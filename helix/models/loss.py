"""Losses of a transformer whose logits stay cut over the vocabulary and whose tokens are routed where they lie."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix.comm import collectives, transport
from helix.comm.mesh import Axis, Mesh
from helix.models.experts import Experts
from helix.partition.grid import shard_range
from helix.partition.shape import TransformerShape


def cross_entropy(logits: Tensor, targets: Tensor, vocab: int, axis: Axis) -> Tensor:
    """The cross-entropy of each token, in nats: log(sum over V of exp(logits)) - logits[target].

    Each rank reduces its own part of the vocabulary to two numbers a token, the log-sum-exp and the target's logit
    (0 where the target is another rank's); only these are moved, and their log-sum-exp and their sum over the ranks
    are the whole vocabulary's. All ranks then hold the same loss, so the backward moves nothing: a rank's share of
    the gradient is softmax - one-hot on its own words.

    One gather serves both reductions, 2 N (p - 1) numbers a rank. All-reducing a maximum and then two sums, as is
    usual, moves 6 N (p - 1) / p, fewer from 4 ranks on, but waits for the ranks twice; and against the E numbers
    a token of each move of the stream either is small.

    Args:
        logits: [N, V@model], cut as `shard_range` cuts; parts may be uneven, or empty where ranks outnumber words.
        targets: [N], indices into the whole vocabulary, the same on all ranks of the axis.
        vocab: V.
        axis: the model axis.

    Returns:
        [N], the same on all ranks; in fp32, or in fp64 where the logits are.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    owned = shard_range(vocab, axis.size, axis.rank)
    own = torch.zeros_like(targets, dtype=wide.dtype)
    if owned:
        index = targets - owned.start
        outside = (index < 0) | (index >= len(owned))
        own = wide.gather(1, index.masked_fill(outside, 0)[:, None])[:, 0].masked_fill(outside, 0)
    parts = collectives.gather(torch.stack([wide.logsumexp(1), own])[None], axis, "loss")  # [ranks, 2, N]
    return parts[:, 0].logsumexp(0) - parts[:, 1].sum(0)


class LoadBalance:
    """The load-balancing loss of a model's routers (GShard), the same function on every grid.

        experts * sum over experts of (share of the tokens whose first choice it is) * (its mean probability)

    It is 1 where the tokens are spread evenly. `Experts.auxiliary_loss` is this of one rank's tokens alone, whose
    mean over ranks is another function than that of all tokens: a model would train differently on another grid.
    Here the shares are those of all ranks' tokens, and the probabilities' gradient is each rank's own.

    Args:
        model: listened to from here on, whenever it learns; a pipeline's stage has some of the layers.
        shape: of the whole model.
        mesh: its ranks.
    """

    def __init__(self, model: nn.Module, shape: TransformerShape, mesh: Mesh) -> None:
        self.mesh, self.layers, self.experts = mesh, shape.layers, shape.experts
        listened = [layer for layer in model.modules() if isinstance(layer, Experts)]
        # Of each layer one for each forward since the last loss, [N@model, experts].
        self._probabilities: list[list[Tensor]] = [[] for _ in listened]
        for layer, found in zip(listened, self._probabilities, strict=True):
            layer.moe.deepspeed_moe.gate.register_forward_hook(partial(_listen, found))

    def loss(self, tokens: int) -> Tensor:
        """This rank's summand of the mean over layers; the sum over the model and stage axes is a replica's loss.

        Args:
            tokens: N of the last forward; what is beyond them on the last ranks is padding.
        """
        (loss,) = self.losses(tokens)
        return loss

    def losses(self, tokens: int) -> list[Tensor]:
        """`loss`, of a batch that several forwards of `tokens` tokens each made up: a summand of each."""
        layers = [[self._own(each, tokens) for each in probabilities] for probabilities in self._probabilities]
        for probabilities in self._probabilities:
            probabilities.clear()
        total = len(layers[0]) * tokens
        counts = [torch.bincount(torch.cat(layer).argmax(-1), minlength=self.experts) for layer in layers]
        share = torch.stack(counts).to(layers[0][0].dtype)  # [layers, experts]
        for axis in (self.mesh.model, self.mesh.data):
            if axis.size > 1:
                share = transport.all_reduce(share, axis, "loss.balance")
        share = share / (total * self.mesh.data.size)
        # One graph for each forward: a pipeline goes back through one after the other.
        means = [torch.stack([own.sum(0) for own in forward]) / total for forward in zip(*layers, strict=True)]
        return [(share * mean).sum() * (self.experts / self.layers) for mean in means]

    def _own(self, probability: Tensor, tokens: int) -> Tensor:
        """Without the last ranks' padding."""
        first = self.mesh.model.rank * probability.shape[0]
        return probability[: max(0, min(probability.shape[0], tokens - first))]


def _listen(found: list[Tensor], gate: Any, inputs: tuple[Tensor, ...], output: object) -> None:
    if torch.is_grad_enabled():  # a validation has no loss that would take them
        # The router's own product once more: it keeps no probabilities.
        found.append(F.linear(inputs[0].float(), gate.wg.weight.float()).softmax(-1))
