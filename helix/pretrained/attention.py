"""The attention function that transformers calls in a partitioned model, and the cache that it reads.

Two schedules of the m-group, both exact. Prefill, with nothing in the cache, is `rows`: each rank has its head
group's whole keys, just gathered, and takes its share of the query rows. After that it is `kvseq`: the cache is dealt
out over the m-group token by token, so that it stays balanced as it grows; each rank attends to its own tokens, and
one exchange merges the partial outputs by their log-sum-exps. A step then moves the same bytes at any context length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from helix.attention.relayout import collect
from helix.comm import transport
from helix.comm.mesh import Axis
from helix.partition.schedules import row_chunks

NAME = "helix"


class Place:
    """What one attention module knows of the partition.

    Args:
        axis: of the slices.

    Attributes:
        columns: which of the mask's columns the keys are that the cache has just returned; None if all.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.columns: Tensor | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T) v of the rank's head group.

    Args:
        query: [B, H@head, T, D], whole heads; key, value: [B, K@head, S, D], or [B, K@head, S@slice, D] of a cache.
        attention_mask: [B, 1, T, S], True where a query sees a key; None if it sees all.
        softcap: bound of the scores, as Gemma 2 has it.

    Returns:
        [B, T, H@head, D@slice], and no weights.
    """
    place: Place = module.helix  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    columns, place.columns = place.columns, None
    if columns is None:
        return _rows(query, key, value, attention_mask, scale, softcap, place.axis), None
    mask = None if attention_mask is None else attention_mask[..., columns]
    return _kvseq(query, key, value, mask, scale, softcap, place.axis), None


def _rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, axis: Axis
) -> Tensor:
    chunks = row_chunks(q.shape[2], axis.size, mask is not None)
    sizes = [sum(map(len, mine)) for mine in chunks]
    order = torch.tensor([t for mine in chunks for run in mine for t in run], device=q.device)
    own = order[sum(sizes[: axis.rank]) :][: sizes[axis.rank]]
    if axis.size > 1:
        q, mask = q[:, :, own], None if mask is None or mask.shape[2] == 1 else mask[:, :, own]
    out = _core(q, k, v, mask, scale, softcap).movedim(2, 0)  # [T@slice, B, H, D]
    out = collect(out.contiguous(), axis, sizes, "attention.out")
    if axis.size > 1:
        out = out[order.argsort()]
    return out.movedim(0, 1)


def _core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[B, H, T, D], for any number of rows."""
    if q.numel() == 0:
        # Tied to the graph, so that this rank's backward takes part in the collectives.
        return q * 0 + (k.sum() + v.sum()) * 0
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = (z.repeat_interleave(repeat, 1) for z in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.tanh(q @ k.mT * scale / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, torch.float32).to(q.dtype) @ v


def _kvseq(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, axis: Axis
) -> Tensor:
    batch, heads, rows, dim = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, -1, dim)  # the heads of a KV head and their rows, one after the other
    scores = (q @ k.mT).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        seen = mask.expand(batch, heads, rows, -1).reshape(*scores.shape)
        scores = scores.masked_fill(~seen, -torch.inf)
    # A rank may see none of the tokens: then its sum is 0 and so is its weight.
    top = (
        scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        if k.shape[2]
        else scores.new_full((*scores.shape[:-1], 1), torch.finfo(scores.dtype).min)
    )
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = weights.to(v.dtype) @ v
    merged = _merge(out.float().reshape(batch * heads * rows, dim), top.reshape(-1, 1), total.reshape(-1, 1), axis)
    return merged.to(v.dtype).view(batch, heads, rows, -1).transpose(1, 2)


def _merge(out: Tensor, top: Tensor, total: Tensor, axis: Axis) -> Tensor:
    """out[X, D]{unnormalised}, top[X, 1], total[X, 1] of each rank's tokens -> [X, D@slice] of all."""
    if axis.size == 1:
        return out / total
    x, width = out.shape[0], out.shape[1] // axis.size
    slices = out.view(x, axis.size, width).transpose(0, 1)
    packed = torch.cat([slices, torch.cat([top, total], -1).expand(axis.size, x, 2)], -1)
    received = transport.all_to_all_even(packed, axis, "attention.merge")
    outs, tops, totals = received.split([width, 1, 1], -1)
    weight = torch.exp(tops - tops.amax(0))
    return (outs * weight).sum(0) / (totals * weight).sum(0)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' boolean mask, always there: a rank sees some of its rows or columns, for which no flag stands."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)


class DealtLayer(DynamicLayer):
    """One layer's cache, dealt out over the m-group: this rank has the tokens p with p % m = its index.

    Args:
        place: of the layer's attention module.
        window: of a sliding layer; older tokens are dropped.

    Attributes:
        keys, values: [B, K@head, S@slice, D].
    """

    def __init__(self, place: Place, window: int | None = None) -> None:
        super().__init__()
        self.place, self.window, self.length = place, window, 0
        self.is_sliding = window is not None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the rank's own of the new tokens; returns all of them if they are the first, else the rank's cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (z[:, :, :0] for z in (key_states, value_states))
        axis, first = self.place.axis, self.length
        new = key_states.shape[-2]
        start = (axis.rank - first) % axis.size
        self.length += new
        self.keys = torch.cat([self.keys, key_states[:, :, start :: axis.size]], dim=-2)
        self.values = torch.cat([self.values, value_states[:, :, start :: axis.size]], dim=-2)
        if first == 0:
            out = key_states, value_states
        else:
            _, offset = self._visible(first, new)
            last = self.length - 1 - (self.length - 1 - axis.rank) % axis.size
            positions = last - axis.size * torch.arange(self.keys.shape[-2] - 1, -1, -1, device=self.keys.device)
            keep = int((positions >= offset).sum())
            self.place.columns = positions[len(positions) - keep :] - offset
            count = self.keys.shape[-2]
            out = self.keys[:, :, count - keep :], self.values[:, :, count - keep :]
        self._forget()
        return out

    def _forget(self) -> None:
        """Drop what no later token will see."""
        if self.window is None:
            return
        oldest = self.length - self.window + 1
        axis, count = self.place.axis, self.keys.shape[-2]
        last = self.length - 1 - (self.length - 1 - axis.rank) % axis.size
        keep = max(0, (last - oldest) // axis.size + 1) if last >= oldest else 0
        keep = min(keep, count)
        self.keys, self.values = self.keys[:, :, count - keep :], self.values[:, :, count - keep :]

    def _visible(self, before: int, new: int) -> tuple[int, int]:
        """Columns of the mask, and the position of the first."""
        offset = 0 if self.window is None else max(before - self.window + 1, 0)
        return before + new - offset, offset

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._visible(self.length, query_length)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        self.length = 0
        super().reset()
