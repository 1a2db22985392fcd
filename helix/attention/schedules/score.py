"""`score`: all-reduce of the partial scores, scores[B, H@head, T, S]{unreduced: slice}.

What a sharding compiler finds by itself when it is told to cut the contracted dim (DTensor's Partial). It
moves T * S numbers for each head where `batch` moves 4 T d / m, so it loses once S > d / 2; kept as the
teaching case. The sum over slices is taken in fp32 at least, since the scores go through an exponential.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helix.attention.kernel import unpack
from helix.comm import collectives
from helix.comm.mesh import Axis
from helix.comm.record import phase


def attend(qkv: Tensor, heads: int, axis: Axis, causal: bool) -> Tensor:
    q, k, v = unpack(qkv, heads)
    batch, length, _, size = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    with phase("attention.scores"):
        grouped = q.unflatten(2, (k.shape[2], -1)).to(precise)  # [B, T, K, H/K, D@slice]
        scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(precise))
    scores = collectives.all_reduce(scores, axis, "attention.scores") / math.sqrt(size * axis.size)
    with phase("attention.core"):
        if causal:
            future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        weights = scores.softmax(-1).to(v.dtype)
        return torch.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, size)
