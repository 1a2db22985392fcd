"""Losses of a transformer whose logits stay cut over the vocabulary and whose tokens are routed where they lie."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helix.comm import collectives, transport
from helix.comm.mesh import Axis, Mesh
from helix.models.experts import Experts
from helix.models.transformer import Transformer
from helix.partition.grid import shard_range


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
        model: listened to from here on; the loss is that of its last forward.
        mesh: its ranks.
    """

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self.mesh = mesh
        self.experts = model.shape.experts
        self._probabilities: dict[int, Tensor] = {}
        layers = [layer for layer in model.modules() if isinstance(layer, Experts)]
        for number, layer in enumerate(layers):
            layer.moe.deepspeed_moe.gate.register_forward_hook(self._listener(number))

    def _listener(self, number: int) -> Any:
        def listen(gate: Any, inputs: tuple[Tensor, ...], output: object) -> None:
            # The router's own product once more, [N@model, experts]: it keeps no probabilities.
            self._probabilities[number] = F.linear(inputs[0].float(), gate.wg.weight.float()).softmax(-1)

        return listen

    def loss(self, tokens: int) -> Tensor:
        """This rank's summand of the mean over layers; the sum over the model axis is a replica's loss.

        Args:
            tokens: N of the last forward; what is beyond them on the last ranks is padding.
        """
        shares, means = [], []
        for _, probability in sorted(self._probabilities.items()):
            first = self.mesh.model.rank * probability.shape[0]
            own = probability[: max(0, min(probability.shape[0], tokens - first))]
            chosen = own.argmax(-1)
            shares.append(torch.bincount(chosen, minlength=self.experts).to(own.dtype))
            means.append(own.sum(0) / tokens)
        share = torch.stack(shares).detach()  # [layers, experts], counts
        for axis in (self.mesh.model, self.mesh.data):
            if axis.size > 1:
                share = transport.all_reduce(share, axis, "loss.balance")
        share = share / (tokens * self.mesh.data.size)
        return (share * torch.stack(means)).sum(-1).mean() * self.experts
