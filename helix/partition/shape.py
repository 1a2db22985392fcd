"""The dims of a whole transformer, as pure integers."""

from __future__ import annotations

from dataclasses import dataclass

from helix.partition.grid import HeadLayout, PartitionError, divisors


@dataclass(frozen=True)
class TransformerShape:
    """A decoder-style transformer: `layers` blocks of attention and MLP (or experts) on a residual stream.

    Args:
        layers: number of blocks.
        width: model width E, the residual stream's last dim.
        heads, kv_heads, head_dim: see `HeadLayout`. heads * head_dim need not equal width, except for
            `aggregate=concat` and `projection=block`, which have no matrix that could change the width.
        mlp_hidden: MLP width F; with experts, the width of each expert.
        vocab: vocabulary V; 256 for bytes.
        rope, qk_norm, causal: attention variants.
        experts: experts per layer; 0 means a dense MLP.
        top_k: experts per token. `check_routing` says what DeepSpeed-MoE, and so Helix's own transformer, supports.
        gated: whether an MLP has a third matrix, its gate (SwiGLU, GeGLU).
        tied: whether the head is the embedding transposed, so that both are one parameter.
        shared_hidden: width of an MLP that every token passes beside its experts; 0 without.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    vocab: int = 256
    rope: bool = True
    qk_norm: bool = False
    causal: bool = True
    experts: int = 0
    top_k: int = 1
    gated: bool = False
    tied: bool = False
    shared_hidden: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "mlp_hidden", "vocab"):
            if getattr(self, name) < 1:
                raise PartitionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.experts < 0:
            raise PartitionError(f"experts must be 0 (dense) or more, not {self.experts}")
        if self.experts and self.top_k < 1:
            raise PartitionError(f"top_k must be at least 1, not {self.top_k}")
        if self.experts and self.top_k > self.experts:
            raise PartitionError(f"top_k={self.top_k} needs at least that many experts, not {self.experts}")
        if self.shared_hidden < 0 or (self.shared_hidden and not self.experts):
            raise PartitionError(
                f"shared_hidden={self.shared_hidden} is the width of an MLP beside experts; take 0, or add experts"
            )
        _ = self.layout

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(self.heads, self.kv_heads, self.head_dim, self.rope)

    @property
    def attention_width(self) -> int:
        """H * D, the width of the concatenated heads."""
        return self.heads * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP or expert, each width x hidden."""
        return 3 if self.gated else 2

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.mlp_matrices * self.width * self.mlp_hidden

    @property
    def dense_hidden(self) -> int:
        """Width of the MLP that every token passes: the dense one, or the one beside the experts."""
        return self.shared_hidden if self.experts else self.mlp_hidden

    @property
    def vocab_matrices(self) -> int:
        """Matrices of vocab x width: embedding and head, or one that is both."""
        return 1 if self.tied else 2

    def parameters(self, projects: bool = True, block: int = 1) -> int:
        """Number of parameters of the whole model.

        Args:
            projects: whether there is a W_O (`aggregate=project`).
            block: number of projection blocks; m * n with `projection=block`, 1 with `projection=column`.
        """
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim * self.width // block
        output = self.attention_width * self.width if projects else 0
        qk_norm = 2 * self.head_dim if self.qk_norm else 0
        mlp = self.mlp_matrices * self.width * self.dense_hidden
        mlp += self.experts * (self.expert_parameters + self.width)  # and the router
        norms = 2 * self.width
        ends = self.width + self.vocab_matrices * self.vocab * self.width
        return self.layers * (qkv + output + qk_norm + mlp + norms) + ends


def check_routing(shape: TransformerShape) -> None:
    """Check that DeepSpeed-MoE can route as this model does.

    Raises:
        PartitionError: if it cannot.
    """
    if shape.experts and shape.top_k not in (1, 2):
        raise PartitionError(f"top_k must be 1 or 2 (what DeepSpeed-MoE routes), not {shape.top_k}")


def check_expert_parallel(experts: int, ep_size: int, ranks: int) -> None:
    """Check that `experts` experts can lie on `ep_size` of `ranks` ranks, replicated ranks / ep_size times.

    Raises:
        PartitionError: with the legal sizes.
    """
    legal = [size for size in divisors(experts) if ranks % size == 0]
    if ep_size not in legal:
        raise PartitionError(
            f"{experts} experts cannot be spread over ep_size={ep_size} of {ranks} ranks: ep_size must divide both; "
            f"legal ep_size: {legal}"
        )


def default_expert_parallel(experts: int, ranks: int) -> int:
    """The largest legal expert-parallel size: 8 experts on 16 ranks give 8 (and 2 replicas of each expert)."""
    return max(size for size in divisors(experts) if ranks % size == 0)


def check_ends(layout: HeadLayout, width: int, aggregate: str, projection: str) -> None:
    """Check that a layer without W_O, or with block projections, keeps the model width.

    Raises:
        PartitionError: if heads * head_dim differs from width where it has to agree.
    """
    for option, value in (("aggregate", aggregate), ("projection", projection)):
        if value in ("concat", "block") and layout.heads * layout.head_dim != width:
            raise PartitionError(
                f"{option}={value} needs heads * head_dim = width, not {layout.heads} * {layout.head_dim} != {width}"
            )
