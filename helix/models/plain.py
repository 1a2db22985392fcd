"""The transformer as one writes it in PyTorch, with nothing of Helix in it: what peers parallelise.

Same function and same weights as `helix.models.transformer.Transformer` with an exact schedule, so that a
comparison of speed compares nothing else. It knows no ranks; attention takes the number of heads from what
its projections return, which is all that PyTorch's tensor parallelism asks of a model. Two seams let a peer
replace a part: `PlainAttention.core`, and `feed_forward`, which makes what follows attention in a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix.comm.parameters import fill_normal
from helix.partition.shape import TransformerShape

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


# q, k, v[B, H, T, D] -> o[B, H, T, D]
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v[B, H, T, D] -> o[B, H, T, D]; each query sees the keys up to its own place."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def full_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v[B, H, T, D] -> o[B, H, T, D]; each query sees every key."""
    return F.scaled_dot_product_attention(q, k, v)


class PlainAttention(nn.Module):
    """Multi-head or grouped-query attention on PyTorch's fused kernel."""

    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.core: Core = causal_core if shape.causal else full_core
        self.queries_per_kv = shape.layout.queries_per_kv
        kv_width = shape.kv_heads * shape.head_dim
        self.q = nn.Linear(shape.width, shape.attention_width, bias=False, dtype=dtype)
        self.k = nn.Linear(shape.width, kv_width, bias=False, dtype=dtype)
        self.v = nn.Linear(shape.width, kv_width, bias=False, dtype=dtype)
        self.o = nn.Linear(shape.attention_width, shape.width, bias=False, dtype=dtype)
        self.q_norm = nn.RMSNorm(shape.head_dim, NORM_EPS, dtype=dtype) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, NORM_EPS, dtype=dtype) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """x[B, T, E] -> [B, T, E]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        q, k, v = (z.transpose(1, 2) for z in (self.q_norm(q), self.k_norm(k), v))  # [B, H or K, T, D]
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        if self.queries_per_kv > 1:
            # Not `enable_gqa=True`: the CPU's flash kernel does not take it, and the fallback forms all scores.
            k, v = (z.repeat_interleave(self.queries_per_kv, dim=1) for z in (k, v))
        o = self.core(q, k, v)
        return self.o(o.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.mlp_hidden, bias=False, dtype=dtype)
        self.down = nn.Linear(shape.mlp_hidden, shape.width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class PlainExperts(nn.Module):
    """Top-k routing to experts that are MLPs; every token goes to its experts, none is dropped."""

    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Linear(shape.width, shape.experts, bias=False, dtype=torch.float32)
        self.experts = nn.ModuleList(PlainMLP(shape, dtype) for _ in range(shape.experts))

    def forward(self, x: Tensor) -> Tensor:
        """x[B, T, E] -> [B, T, E]."""
        flat = x.flatten(0, 1)
        weight, chosen = self.router(flat.float()).softmax(-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, place = (chosen == index).nonzero(as_tuple=True)
            y = y.index_add(0, token, (weight[token, place, None] * expert(flat[token])).to(y.dtype))
        return y.view_as(x)


class PlainBlock(nn.Module):
    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, NORM_EPS, dtype=dtype)
        self.attention = PlainAttention(shape, dtype)
        self.mlp_norm = nn.RMSNorm(shape.width, NORM_EPS, dtype=dtype)
        self.mlp = feed_forward

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class PlainTransformer(nn.Module):
    """The dense or mixture-of-experts transformer of `shape`.

    Args:
        feed_forward: makes each block's module after attention, x[B, T, E] -> [B, T, E], which fills its weights
            by an `init_weights(seed, name)` of its own; default the MLP, or the experts, of `shape`.
    """

    def __init__(
        self,
        shape: TransformerShape,
        dtype: torch.dtype | None = None,
        feed_forward: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        own = PlainExperts if shape.experts else PlainMLP
        make = feed_forward or (lambda: own(shape, dtype))
        self.embedding: nn.Embedding | None = nn.Embedding(shape.vocab, shape.width, dtype=dtype)
        # By number and not a list, whose part would number its own blocks from 0: see `keep_layers`.
        self.blocks = nn.ModuleDict({str(i): PlainBlock(shape, dtype, make()) for i in range(shape.layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(shape.width, NORM_EPS, dtype=dtype)
        self.head: nn.Linear | None = nn.Linear(shape.width, shape.vocab, bias=False, dtype=dtype)

    def init_weights(self, seed: int) -> None:
        """The weights that `Transformer.init_weights(seed)` gives; norms are ones already. Of a whole model."""
        assert self.embedding is not None
        assert self.head is not None
        fill_normal(self.embedding.weight, 1.0, seed, "embedding.weight")
        for index, block in self.blocks.items():
            assert isinstance(block, PlainBlock)
            if callable(fill := getattr(block.mlp, "init_weights", None)):
                fill(seed, f"blocks.{index}.mlp")
            else:
                _fill_linear(block.mlp, f"blocks.{index}.mlp", seed)
            _fill_linear(block.attention, f"blocks.{index}.attention", seed)
        fill_normal(self.head.weight, self.head.in_features**-0.5, seed, "head.weight")

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens[B, T], at `positions`[T] of their sequences (default 0 to T - 1) -> logits[B, T, V].

        A pipeline's stage has no embedding, or no norm and head: it takes, or gives, x[B, T, E].
        """
        x = tokens if self.embedding is None else self.embedding(tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rope_angles(positions, self.shape.head_dim, x.dtype) if self.shape.rope else None
        for block in self.blocks.values():
            x = block(x, rope)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))

    def keep_layers(self, kept: range) -> None:
        """Keep only the run of blocks that a pipeline stage has, under their own numbers, and the ends next to it."""
        if kept.start > 0:
            self.embedding = None
        if kept.stop < len(self.blocks):
            self.norm = self.head = None
        self.blocks = nn.ModuleDict({str(i): self.blocks[str(i)] for i in kept})


def _fill_linear(module: nn.Module, prefix: str, seed: int) -> None:
    """Fill the linear layers of a block's part as `Transformer` fills its own: attention.q there is attention.wq."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            key = f"w{name}" if name in ("q", "k", "v", "o") else name
            fill_normal(layer.weight, layer.in_features**-0.5, seed, f"{prefix}.{key}")


def rope_angles(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D/2] of each position and feature pair, on the device of `positions`."""
    half = head_dim // 2
    frequency = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angle = positions.double()[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = z.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
