"""The whole model on one device, from whole weights, with explicit scores: what a run's accuracy is held against.

It shares no layer with the partitioned model, only the names and seeds of the weights, so that both hold the
same numbers without moving any. Experts are computed one after the other, each for the tokens routed to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix.attention.oracle import attention_oracle, block_weights
from helix.comm.parameters import fill_normal
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape

NORM_EPS = 1e-6


class Reference(nn.Module):
    """The transformer of `shape` on one device.

    Args:
        shape: the model's dims.
        grid, options: of the run it is the reference for. They change the function with `schedule=perslice`
            (h * m narrow heads), `projection=block` (block-diagonal weights) and `aggregate=concat` (no W_O).
        narrow: whether attention has h * m narrow heads, as `perslice` computes.
        dtype: of weights and arithmetic; fp32 unless the run is wider.

    Attributes:
        routes: for each MoE layer of the last forward, the experts [N, k] that the tokens were sent to.
        gates: of the same, the probabilities [N, experts] that they were chosen by.
    """

    def __init__(
        self,
        shape: TransformerShape,
        grid: Grid,
        options: AttentionOptions,
        narrow: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape, self.grid, self.options = shape, grid, options
        self.slices = grid.m if narrow else 1
        self.dtype = dtype
        self.routes: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.weights = nn.ParameterDict()
        self._std: dict[str, float] = {}
        self._add("embedding.weight", (shape.vocab, shape.width), 1.0)
        for layer in range(shape.layers):
            self._add(f"blocks.{layer}.attention_norm.weight", (shape.width,))
            self._add_attention(f"blocks.{layer}.attention")
            self._add(f"blocks.{layer}.mlp_norm.weight", (shape.width,))
            self._add_mlp(f"blocks.{layer}.mlp")
        self._add("norm.weight", (shape.width,))
        self._add("head.weight", (shape.vocab, shape.width), shape.width**-0.5)

    def init_weights(self, seed: int) -> None:
        """The weights that `Transformer.init_weights(seed)` gives, whole; norms are ones already."""
        for name, std in self._std.items():
            fill_normal(self._weight(name), std, seed, name)

    def named_weights(self) -> dict[str, Tensor]:
        """The weights by the names that they have in the partitioned model; experts by number."""
        return {key.replace("/", "."): weight for key, weight in self.weights.items()}

    def _add(
        self, name: str, size: tuple[int, ...], std: float | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """A weight of ones, that `init_weights` draws with `std` if it has one."""
        self.weights[_key(name)] = nn.Parameter(torch.ones(*size, dtype=dtype or self.dtype))
        if std is not None:
            self._std[name] = std

    def _add_attention(self, name: str) -> None:
        shape, layout = self.shape, self.shape.layout
        head = (layout.parts, layout.head_dim // layout.parts)
        columns = shape.width // self.grid.ranks if self.options.projection == "block" else shape.width
        for key, heads in (("wq", shape.heads), ("wk", shape.kv_heads), ("wv", shape.kv_heads)):
            self._add(f"{name}.{key}", (heads, *head, columns), columns**-0.5)
        if self.options.aggregate == "project":
            self._add(f"{name}.wo", (shape.width, shape.heads, *head), shape.attention_width**-0.5)
        if shape.qk_norm:
            self._add(f"{name}.q_norm", head)
            self._add(f"{name}.k_norm", head)

    def _add_mlp(self, name: str) -> None:
        shape = self.shape
        names = [f"{name}.experts.{e}" for e in range(shape.experts)] or [name]
        for each in names:
            self._add(f"{each}.up", (shape.mlp_hidden, shape.width), shape.width**-0.5)
            self._add(f"{each}.down", (shape.width, shape.mlp_hidden), shape.mlp_hidden**-0.5)
        if shape.experts:
            self._add(f"{name}.router", (shape.experts, shape.width), shape.width**-0.5, torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens[B, T] -> logits[B * T, V]."""
        self.routes, self.gates = [], []
        x = F.embedding(tokens, self._weight("embedding.weight"))
        for layer in range(self.shape.layers):
            block = f"blocks.{layer}"
            x = x + self._attention(f"{block}.attention", self._norm(f"{block}.attention_norm", x))
            x = x + self._mlp(f"{block}.mlp", self._norm(f"{block}.mlp_norm", x))
        return F.linear(self._norm("norm", x), self._weight("head.weight")).flatten(0, 1)

    def _weight(self, name: str) -> Tensor:
        return self.weights[_key(name)]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + NORM_EPS).rsqrt() * self._weight(f"{name}.weight")

    def _attention(self, name: str, x: Tensor) -> Tensor:
        layout = self.shape.layout
        wq, wk, wv = (self._weight(f"{name}.{key}") for key in ("wq", "wk", "wv"))
        if self.options.projection == "block":
            wq, wk, wv = (block_weights(w, layout.heads, self.grid.m, self.grid.n) for w in (wq, wk, wv))
        wo = self._weight(f"{name}.wo") if self.options.aggregate == "project" else None
        q_norm, k_norm = (self._weight(f"{name}.{z}_norm") if self.shape.qk_norm else None for z in "qk")
        return attention_oracle(
            x,
            wq,
            wk,
            wv,
            wo,
            q_norm=q_norm,
            k_norm=k_norm,
            causal=self.shape.causal,
            rope=self.shape.rope,
            slices=self.slices,
        )

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        if not self.shape.experts:
            return self._feed_forward(name, x)
        flat = x.flatten(0, 1)
        gates = F.linear(flat.float(), self._weight(f"{name}.router")).softmax(-1)
        weight, expert = gates.topk(self.shape.top_k, dim=-1)
        if self.shape.top_k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        self.routes.append(expert)
        self.gates.append(gates)
        y = torch.zeros_like(flat)
        for index in range(self.shape.experts):
            token, rank = (expert == index).nonzero(as_tuple=True)
            y[token] += (weight[token, rank, None] * self._feed_forward(f"{name}.experts.{index}", flat[token])).to(y)
        return y.view_as(x)

    def _feed_forward(self, name: str, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self._weight(f"{name}.up"))), self._weight(f"{name}.down"))


def _key(name: str) -> str:
    return name.replace(".", "/")  # ParameterDict takes no dots
