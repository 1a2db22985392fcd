"""The dense transformer as one writes it in PyTorch, with nothing of Helix in it: what peers parallelise.

Same function and same weights as `helix.models.transformer.Transformer` with an exact schedule, so that a
comparison of speed compares nothing else. It knows no ranks; attention takes the number of heads from what
its projections return, which is all that PyTorch's tensor parallelism asks of a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix.comm.parameters import fill_normal
from helix.partition.grid import PartitionError
from helix.partition.shape import TransformerShape

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


class PlainAttention(nn.Module):
    """Multi-head or grouped-query attention on PyTorch's fused kernel."""

    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.head_dim, self.causal = shape.head_dim, shape.causal
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
        o = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(o.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.mlp_hidden, bias=False, dtype=dtype)
        self.down = nn.Linear(shape.mlp_hidden, shape.width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class PlainBlock(nn.Module):
    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, NORM_EPS, dtype=dtype)
        self.attention = PlainAttention(shape, dtype)
        self.mlp_norm = nn.RMSNorm(shape.width, NORM_EPS, dtype=dtype)
        self.mlp = PlainMLP(shape, dtype)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class PlainTransformer(nn.Module):
    """The dense transformer of `shape`.

    Raises:
        PartitionError: if the shape has experts.
    """

    def __init__(self, shape: TransformerShape, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if shape.experts:
            raise PartitionError(f"the plain transformer is dense, and this shape has {shape.experts} experts")
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width, dtype=dtype)
        self.blocks = nn.ModuleList(PlainBlock(shape, dtype) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, NORM_EPS, dtype=dtype)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False, dtype=dtype)

    def init_weights(self, seed: int) -> None:
        """The weights that `Transformer.init_weights(seed)` gives; norms are ones already."""
        fill_normal(self.embedding.weight, 1.0, seed, "embedding.weight")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fill_normal(module.weight, module.in_features**-0.5, seed, _partitioned_name(name))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens[B, T] -> logits[B, T, V]."""
        x = self.embedding(tokens)
        rope = _angles(tokens.shape[1], self.shape.head_dim, x) if self.shape.rope else None
        for block in self.blocks:
            x = block(x, rope)
        return self.head(self.norm(x))


def _partitioned_name(name: str) -> str:
    """A linear layer's name -> its weight's in `Transformer`: blocks.0.attention.q -> blocks.0.attention.wq."""
    *path, leaf = name.split(".")
    if leaf in ("q", "k", "v", "o"):
        return ".".join([*path, f"w{leaf}"])
    return f"{name}.weight" if name == "head" else name


def _angles(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D/2] of each position and feature pair, in the dtype and on the device of `like`."""
    half = head_dim // 2
    frequency = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64, device=like.device) / half)
    angle = torch.arange(length, dtype=torch.float64, device=like.device)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = z.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
