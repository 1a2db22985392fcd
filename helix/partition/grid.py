"""Who owns which heads and which features.

Sharded-shape notation, used in every docstring of the package. A tensor's *dims* are letters, a mesh's
*axes* are words; `X@axis` says that dim X is cut along that axis, `{unreduced: axis}` that the true value
is the sum over it:

    B batch    T query length    S key length    E model width    N tokens (B * T)
    H query heads    K key/value heads    D features of one head    F MLP width    V vocabulary

    q[B, T, H@head, D@slice]        scores[B, H@head, T, S]{unreduced: slice}

The mesh has n ranks on its `head` axis (head groups, index i) and m ranks on its `slice` axis (feature
slices, index j); the slice axis is the inner one, so rank = i * m + j. Names carry m first, as the
papers' "2x8 or 4x4" do: `helix_{m}x{n}`.

Worked example, 2 heads of 8 features on m=2, n=2 (four ranks):

    rank (i, j)     owns head    contiguous features    pair-preserving features (RoPE)
    (0, 0)          0            0 1 2 3                0 1 | 4 5
    (0, 1)          0            4 5 6 7                2 3 | 6 7
    (1, 0)          1            0 1 2 3                0 1 | 4 5
    (1, 1)          1            4 5 6 7                2 3 | 6 7

RoPE rotates feature f together with f + D/2, so a contiguous slice would hold half of each pair. A
pair-preserving slice j holds chunk j of *both* halves; stored as [.., 2, D/2] that is one plain shard of
the last dim, with no index lists.

Source: papers, "Proposed Two-Level Partitioning Scheme" (h_g = h/n, d_s = d/m).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


class PartitionError(ValueError):
    """A model, a grid and a number of ranks that do not fit together. One sentence, with the legal choices."""


@dataclass(frozen=True)
class HeadLayout:
    """The attention dims that a grid has to divide.

    Args:
        heads: query heads H.
        kv_heads: key/value heads K; equal to `heads` for multi-head attention, 1 for multi-query.
        head_dim: features D of one head.
        rope: whether rotary embeddings pair feature f with f + D/2.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise PartitionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise PartitionError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}; legal kv_heads: {divisors(self.heads)}"
            )
        if self.rope and self.head_dim % 2:
            raise PartitionError(f"RoPE rotates pairs of features, so head_dim must be even, not {self.head_dim}")

    @property
    def parts(self) -> int:
        """How many runs one slice of a head consists of: 2 with RoPE (chunk j of both halves), else 1."""
        return 2 if self.rope else 1

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Grid:
    """A grid of m feature slices by n head groups: one attention layer on m * n ranks.

    Args:
        m: slices of every head's features (`slice` axis).
        n: groups of heads (`head` axis).

    Raises:
        PartitionError: if either is below 1.
    """

    m: int
    n: int

    def __post_init__(self) -> None:
        if self.m < 1 or self.n < 1:
            raise PartitionError(f"a grid needs m >= 1 and n >= 1, not m={self.m}, n={self.n}")

    @property
    def ranks(self) -> int:
        return self.m * self.n

    @property
    def name(self) -> str:
        return f"helix_{self.m}x{self.n}"

    def rank(self, head_group: int, feature_slice: int) -> int:
        """Rank of (i, j) within the grid; the slice axis is the inner one."""
        return head_group * self.m + feature_slice

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(head group i, feature slice j) of a rank within the grid."""
        return divmod(rank, self.m)

    def check(self, heads: int, kv_heads: int | None = None, head_dim: int = 64, rope: bool = False) -> None:
        """Check that this grid divides these heads without replicating any key/value head.

        Raises:
            PartitionError: naming what does not divide and listing the legal (m, n) of this many ranks.
        """
        layout = HeadLayout(heads, heads if kv_heads is None else kv_heads, head_dim, rope)
        reason = self._misfit(layout)
        if reason:
            legal = legal_grids(layout, self.ranks)
            raise PartitionError(
                f"{self.name} cannot partition this attention: {reason}; {describe(legal, self.ranks)}"
            )

    def fits(self, layout: HeadLayout) -> bool:
        return self._misfit(layout) is None

    def _misfit(self, layout: HeadLayout) -> str | None:
        if layout.kv_heads % self.n:
            # n | kv_heads implies n | heads. The rest of the devices goes to m, which splits features,
            # so that no K/V weight or cache is ever held twice.
            what = "heads" if layout.kv_heads == layout.heads else "kv_heads"
            return f"n={self.n} does not divide {what}={layout.kv_heads}"
        if layout.rope and (layout.head_dim // 2) % self.m:
            return (
                f"m={self.m} does not divide head_dim/2={layout.head_dim // 2} "
                "(RoPE needs slices that hold whole feature pairs)"
            )
        if layout.head_dim % self.m:
            return f"m={self.m} does not divide head_dim={layout.head_dim}"
        return None

    def owned_heads(self, heads: int, head_group: int) -> range:
        """Heads (query or key/value, by the count given) of head group i."""
        size = heads // self.n
        return range(head_group * size, (head_group + 1) * size)

    def owned_features(self, layout: HeadLayout, feature_slice: int) -> list[int]:
        """Features of every head that slice j holds, in the order in which it holds them."""
        run = layout.head_dim // layout.parts
        size = run // self.m
        return [part * run + feature_slice * size + offset for part in range(layout.parts) for offset in range(size)]


def shard_range(count: int, ranks: int, rank: int) -> range:
    """Indices that `rank` holds of a dim of `count` that all `ranks` cut.

    Ceil-sized pieces, the last ones smaller or empty, as DTensor cuts; so an MLP width or a vocabulary need not
    be divisible by the number of ranks.
    """
    size = -(-count // ranks)
    return range(min(rank * size, count), min((rank + 1) * size, count))


def divisors(value: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return low + [value // d for d in reversed(low) if d * d != value]


def legal_grids(layout: HeadLayout, ranks: int) -> list[Grid]:
    """Every grid of exactly `ranks` ranks that divides this layout, widest head axis first."""
    grids = [Grid(m=ranks // n, n=n) for n in reversed(divisors(ranks))]
    return [grid for grid in grids if grid.fits(layout)]


def describe(grids: list[Grid], ranks: int) -> str:
    """The legal grids as half a sentence for an error message."""
    if not grids:
        return f"no (m, n) with m*n={ranks} is legal for it"
    return f"legal (m, n) on {ranks} ranks: " + ", ".join(f"({g.m}, {g.n})" for g in grids)
