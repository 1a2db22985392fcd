"""Attention on one rank's part: with transformers' masks and scores, whole, or partial over some of the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that are formed at once where no fused kernel does without them: 16 MB in fp32.
BLOCK_SCORES = 2**22
# Of so few query rows, as decoding has, 16-bit scores are formed in fp32: widening the keys costs little then.
FEW_ROWS = 8


class Scoring(NamedTuple):
    """How a query scores a key.

    Args:
        scale: of q k^T.
        softcap: bound of the scores, as Gemma 2 has it; None if there is none.
        dropout: probability that a weight is dropped.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring, causal: bool = False) -> Tensor:
    """softmax(q k^T) v.

    Args:
        q: [B, H, T, D]; k, v: [B, K, S, D], with K dividing H.
        mask: [B, 1, T, S], dims of 1 where all are alike: True where a query sees a key, or numbers to add to the
            scores; None if it sees all.
        causal: without a mask, that query t sees keys up to S - T + t.

    Returns:
        [B, H, T, D]; 0 for a query that sees no key.
    """
    if q.numel() == 0:
        # Tied to the graph, so that this rank's backward takes part in the collectives.
        return q * 0 + (k.sum() + v.sum()) * 0
    rows, keys = q.shape[2], k.shape[2]
    if causal and (rows != keys or scoring.softcap is not None):
        mask = None if rows == 1 else torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        mask, causal = mask if mask is None else mask[None, None], False
    if scoring.softcap is not None:
        return torch.cat([_explicit(*block, scoring)[0] for block in _blocks(q, k, v, mask)], 2)
    grouped = q.shape[1] != k.shape[1]
    if grouped and rows == 1:
        # The heads of a KV head as its rows: keys are not repeated, nor do kernels have to know of groups.
        out = F.scaled_dot_product_attention(_packed(q, k), k, v, mask, scoring.dropout, scale=scoring.scale)
        return out.reshape(q.shape)
    if grouped and mask is not None and q.is_cuda:
        # With a mask, CUDA's fused kernels take no groups, and what is left forms all scores.
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, mask, scoring.dropout, causal, scale=scoring.scale, enable_gqa=grouped
    )


def partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, and what it takes to merge it with that to the others.

    Args:
        q, k, v, mask: as of `attention`; S may be 0.

    Returns:
        out[B, H, T, D], the average of the values seen, and lse[B, H, T, 1] in fp32 at least, the logarithm of the
        sum of their weights' exponentials; 0 and the lowest finite number for a query that sees none of these keys.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if k.shape[2] == 0:
        # Tied to the graph, as in `attention`.
        out = q * 0 + (k.sum() + v.sum()) * 0
        return out, q.new_full((*q.shape[:3], 1), torch.finfo(wide).min, dtype=wide)
    if _is_plain(q, mask, scoring):
        return _fused(q, k, v, mask, scoring)
    outs, sums = zip(*(_explicit(*block, scoring) for block in _blocks(q, k, v, mask)), strict=True)
    return (outs[0], sums[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(sums, 2))


def _is_plain(q: Tensor, mask: Tensor | None, scoring: Scoring) -> bool:
    """Whether the CPU's flash kernel can do it, which gives no gradient of its lse."""
    return (
        q.device.type == "cpu"
        and scoring.softcap is None
        and not scoring.dropout
        and (mask is None or mask.dtype == torch.bool)
        and not (torch.is_grad_enabled() and q.requires_grad)
    )


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """The kernel under `scaled_dot_product_attention`, called itself for its lse.

    Half the time of the plain operations for one token (28 us against 56 for 512 keys), no score in memory for many,
    and sums in fp32 for 16-bit numbers.
    """
    rows, bias = mask, None
    if rows is not None:
        if q.shape[2] > 1:
            rows = rows.expand(-1, -1, q.shape[2], -1).repeat(1, 1, q.shape[1] // k.shape[1], 1)
        bias = torch.where(rows, 0.0, -torch.inf).to(q.dtype)
    query = _packed(q, k)
    if query.stride(-1) != 1:
        # As of slices of one feature that were gathered without a copy: the kernel itself would read beside them.
        query = query.contiguous()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, k, v, attn_mask=bias, scale=scoring.scale
    )
    if rows is not None:
        # It says 0 for a row that sees no key, which would weigh as much as a score of 0.
        lse = torch.where(rows.any(-1), lse, torch.finfo(lse.dtype).min)
    return out.reshape(q.shape), lse.reshape(*q.shape[:3], 1)


def _packed(q: Tensor, k: Tensor) -> Tensor:
    """q[B, H, T, D] -> [B, K, H/K * T, D]: the heads of a KV head and their rows, one after the other."""
    return q if q.shape[1] == k.shape[1] else q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Runs of rows, so that no more than about BLOCK_SCORES scores are formed at once."""
    batch, heads, rows, _ = q.shape
    size = max(1, BLOCK_SCORES // (batch * heads * k.shape[2]))
    if size >= rows:
        return [(q, k, v, mask)]
    queries = q.split(size, 2)
    masks = [mask] * len(queries) if mask is None or mask.shape[2] == 1 else mask.split(size, 2)
    return [(block, k, v, seen) for block, seen in zip(queries, masks, strict=True)]


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """As `partial`, on any device, with gradients, forming all scores."""
    batch, heads, rows, _ = q.shape
    groups, keys = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    if rows <= FEW_ROWS:
        scores = (_packed(q, k).to(wide) * scoring.scale) @ k.to(wide).mT
    else:
        # Scaled first, as 16 bits may be too few for products that are not.
        scores = ((_packed(q, k).to(wide) * scoring.scale).to(q.dtype) @ k.mT).to(wide)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        split = scores.view(batch, groups, -1, rows, keys)
        seen = mask.unsqueeze(2)
        split = split.masked_fill(~seen, -torch.inf) if mask.dtype == torch.bool else split + seen
        scores = split.view(scores.shape)
    limits = torch.finfo(wide)
    top = scores.detach().amax(-1, keepdim=True).clamp_min(limits.min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True).clamp_min(limits.tiny)
    if scoring.dropout:
        weights = F.dropout(weights, scoring.dropout)
    out = ((weights / total).to(v.dtype) @ v).view(q.shape)
    return out, (top + total.log()).view(batch, heads, rows, 1)
