"""What one operator that passed the dispatcher costs: its kind, its FLOPs, the bytes that it reads and writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# An operator's kind, named as `helix.planner.seconds.Seconds` names what time is spent on.
MATMUL, ATTENTION, MEMORY, EXCHANGE = "matmul", "attention", "memory", "exchange"
KINDS = (MATMUL, ATTENTION, MEMORY, EXCHANGE)
_BATCHED = ("bmm", "baddbmm")  # in attention: the products of unfused scores
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")


@dataclass(frozen=True)
class Operator:
    """One operator, or one collective.

    Args:
        name: as a profile names it: "aten::mm"; of a collective "collective/name".
        kind: one of `KINDS`.
        part: of the model: embedding, attention, mlp, head, or what lies between them.
        flops: of matrix products and attention, a multiply-add being two.
        nbytes: read and written; of a collective, that leave this rank.
        ranks: of a collective's group.
        width: the smallest dim of a matrix product, the features of attention's heads.
        length: of the sequences that attention sees.
    """

    name: str
    kind: str
    part: str
    flops: int
    nbytes: int
    ranks: tuple[int, ...] = ()
    width: float = math.inf
    length: float = math.inf


def operator(func: Any, args: Any, kwargs: Any, out: Any, part: str) -> Operator | None:
    """What an operator cost that has just been called; None for one that computes nothing: views, and empty memory."""
    name = str(func._schema.name)
    short = name.partition("::")[2]
    if short in _ALLOCATIONS or func.is_view:
        return None
    inputs, outputs = list(tensors((args, kwargs))), list(tensors(out))
    held = {storage_of(each) for each in inputs}
    made = [each for each in outputs if storage_of(each) not in held]
    written = [each for each in outputs if storage_of(each) in held] if func._schema.is_mutable else []
    if not made and not written:
        return None  # an alias, or what only looks at shapes
    nbytes = sum(map(touched, [*inputs, *made, *written]))
    flops = _flops(func, args, kwargs, out)
    kind = MATMUL if flops else MEMORY
    if flops and short in _BATCHED and part == ATTENTION:
        kind = ATTENTION
    return Operator(name, kind, part, flops, nbytes, width=_width(inputs, outputs) if flops else math.inf)


def _width(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """The smallest dim of a matrix product."""
    return min(min(each.shape[-2:]) for each in (*inputs, *outputs) if each.ndim > 1)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func is torch.ops.aten._grouped_mm.default:  # rows[N, K] of groups, each with its own weight[K, M]
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    counted = flop_registry.get(func._overloadpacket)
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=out))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Any, causal: bool, part: str) -> Operator:
    """What a fused kernel costs for q[B, H, T, D], k[B, K, S, D], v[B, K, S, D']: no score is ever in memory.

    Args:
        mask: numbers or truths for each pair, all of which are computed, or a `CausalBias`, by whose rows the kernel
            computes the pairs that are seen.
        causal: whether query t sees keys 0 to t.
    """
    rows, keys = q.shape[2], k.shape[2]
    if isinstance(mask, CausalBias) and mask.variant == CausalVariant.LOWER_RIGHT:
        pairs = rows * (keys - rows) + rows * (rows + 1) // 2
    elif causal or isinstance(mask, CausalBias):
        pairs = sum(min(row + 1, keys) for row in range(rows))
    else:
        pairs = rows * keys
    flops = 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[3] + v.shape[3])
    read = [q, k, v, out]
    if isinstance(mask, Tensor) and not isinstance(mask, CausalBias):
        read.append(mask)
    nbytes = sum(map(touched, read))
    name = "aten::scaled_dot_product_attention"
    return Operator(name, ATTENTION, part, flops, nbytes, width=q.shape[3], length=keys)


def touched(x: Tensor) -> int:
    """Bytes of a tensor's numbers; those that an expanded one shows more than once are read from memory once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors among arguments or results."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def storage_of(x: Tensor) -> int:
    """A number of the memory that a tensor shares with its views."""
    return x.untyped_storage()._cdata
