"""The transformer: embedding, blocks of attention and MLP (or experts) on a residual stream, head.

It composes partitioned parts and does not know its rank; with a 1 x 1 grid every part is whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from helix.attention import HelixAttention
from helix.comm.mesh import Mesh
from helix.comm.stream import Stream, make_stream
from helix.models.layers import MLP, Embedding, FeedForward, Head, RMSNorm
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape, default_expert_parallel


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP may be experts."""

    def __init__(self, shape: TransformerShape, attention: HelixAttention, mlp: FeedForward, mesh: Mesh) -> None:
        super().__init__()
        dtype = attention.wq.dtype
        self.attention_norm = RMSNorm(shape.width, mesh, attention.stream, dtype)
        self.attention = attention
        self.mlp_norm = RMSNorm(shape.width, mesh, attention.stream, dtype)
        self.mlp = mlp

    def init_weights(self, seed: int, name: str) -> None:
        self.attention_norm.init_weights()
        self.attention.init_weights(seed, f"{name}.attention")
        self.mlp_norm.init_weights()
        self.mlp.init_weights(seed, f"{name}.mlp")

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """The stream -> the stream."""
        x = x + self.attention(self.attention_norm(x), shape)
        return x + self.mlp(self.mlp_norm(x), shape)


class Transformer(nn.Module):
    """A dense or mixture-of-experts transformer over the m * n ranks of a mesh.

    Args:
        shape: the model's dims.
        mesh: the ranks.
        options: schedule, ends and the residual stream's layout.
        ep_size: ranks that share one set of experts; None for the largest legal.
        dtype: of parameters and activations.

    Raises:
        PartitionError: if the grid does not fit the shape.
    """

    def __init__(
        self,
        shape: TransformerShape,
        mesh: Mesh,
        options: AttentionOptions,
        ep_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.mesh, self.options = shape, mesh, options
        self.ep_size = (ep_size or default_expert_parallel(shape.experts, mesh.grid.ranks)) if shape.experts else 1
        self.stream = make_stream(options.residual, mesh.model)
        self.embedding = Embedding(shape.vocab, shape.width, mesh, self.stream, dtype)
        self.blocks = nn.ModuleList(self._block(dtype) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, mesh, self.stream, dtype)
        self.head = Head(shape.vocab, shape.width, mesh, self.stream, dtype)

    def _block(self, dtype: torch.dtype | None) -> Block:
        shape, options = self.shape, self.options
        attention = HelixAttention(
            shape.width,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            mesh=self.mesh,
            schedule=options.schedule,
            causal=shape.causal,
            rope=shape.rope,
            qk_norm=shape.qk_norm,
            aggregate=options.aggregate,
            concat=options.concat,
            projection=options.projection,
            stream=self.stream,
            dtype=dtype,
            initialize=False,
        )
        return Block(shape, attention, self._mlp(self.stream, dtype), self.mesh)

    def _mlp(self, stream: Stream, dtype: torch.dtype | None) -> FeedForward:
        shape = self.shape
        if not shape.experts:
            return MLP(shape.width, shape.mlp_hidden, self.mesh, stream, dtype)
        from helix.models.experts import Experts  # needs DeepSpeed, which a dense model does without

        return Experts(
            shape.width, shape.mlp_hidden, shape.experts, shape.top_k, self.ep_size, self.mesh, stream, dtype
        )

    def init_weights(self, seed: int) -> None:
        """Fill all weights; the same whole weights on every grid."""
        self.embedding.init_weights(seed, "embedding")
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.init_weights(seed, f"blocks.{index}")
        self.norm.init_weights()
        self.head.init_weights(seed, "head")

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens[B, T], the same on all ranks of a replica -> logits[B * T, V@model]."""
        shape = (tokens.shape[0], tokens.shape[1])
        x = self.embedding(tokens.flatten())
        for block in self.blocks:
            x = block(x, shape)
        return self.head(self.norm(x), shape)

    def whole_logits(self, logits: Tensor) -> Tensor:
        """logits[N, V@model] -> [N, V] on every rank; for comparing, not for the hot path."""
        if self.mesh.grid.ranks == 1:
            return logits
        shape = torch.Size((logits.shape[0], self.shape.vocab))
        shards = DTensor.from_local(
            logits, self.mesh.flat, [Shard(1)], run_check=False, shape=shape, stride=(shape[1], 1)
        )
        return shards.full_tensor()
