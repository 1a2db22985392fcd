"""`HelixAttention`: one attention layer on m x n ranks.

    x[N, E] -> q, k, v[B, T, (H + 2K)@head, D@slice] -> QK-norm, RoPE -> schedule -> W_O or concatenation

Each rank (i, j) holds 1 / (m n) of W_Q, W_K, W_V and W_O: the heads of group i, slice j of their features.
The layer knows its mesh; the model around it does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from helix.attention.concat import concat_flat, concat_hierarchical
from helix.attention.kernel import rotate_slice
from helix.attention.oracle import QK_NORM_EPS
from helix.attention.schedules import ATTEND
from helix.comm import collectives
from helix.comm.mesh import SINGLE, Mesh
from helix.comm.parameters import empty_parameter, fill, fill_normal, local
from helix.comm.record import phase
from helix.comm.stream import Replicated, Stream
from helix.partition.cost import cheapest_schedule
from helix.partition.grid import Grid, HeadLayout
from helix.partition.schedules import check_schedule
from helix.partition.shape import check_ends


class HelixAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, partitioned over heads and features.

    Parameters, in `nn.Linear`'s (out, in) order with the head dims spelled out (P = 2 with RoPE, else 1; E is
    the model width, or E / (m n) with `projection=block`):

        wq[H@head, P, (D/P)@slice, E]   wk, wv[K@head, P, (D/P)@slice, E]   wo[E, H@head, P, (D/P)@slice]
        q_norm, k_norm[P, (D/P)@slice]

    Viewed as [H * D, E] and [E, H * D] the wholes are the weights of ordinary linear layers.

    Args:
        width: E.
        heads, kv_heads, head_dim: H, K (default H) and D (default E / H).
        mesh: the ranks; None for a single device, with plain parameters.
        schedule: a name of `helix.partition.schedules`, or "auto": the cheapest legal exact one for each
            batch and length, from the closed forms.
        causal, rope, qk_norm: the attention's variants. QK-norm is RMS over a head's features before RoPE;
            exact schedules sum it over the slices, `perslice` norms each narrow head.
        aggregate: "project" (W_O, row-parallel) or "concat" (the papers': no W_O, every rank gets all heads).
        concat: "hierarchical" or "flat", for `aggregate="concat"`.
        projection: "column", W^(i,j) in R^(E x d_s h_g), or "block", the papers' literal
            W^(i,j) in R^(d_s h_g x d_s h_g): block-diagonal, so that the function depends on the grid.
        stream: the residual stream's layout; default replicated.
        initialize: fill the weights, by a seed drawn from torch's generator. False leaves them as memory has them,
            for `init_weights` or a checkpoint.

    Raises:
        PartitionError: if the grid does not divide the heads or the ends do not fit the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        mesh: Mesh | None = None,
        schedule: str = "auto",
        causal: bool = True,
        rope: bool = False,
        qk_norm: bool = False,
        aggregate: str = "project",
        concat: str = "hierarchical",
        projection: str = "column",
        stream: Stream | None = None,
        dtype: torch.dtype | None = None,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        self.layout = HeadLayout(heads, kv_heads or heads, head_dim or width // heads, rope)
        self.grid = mesh.grid if mesh else Grid(1, 1)
        self.grid.check(heads, self.layout.kv_heads, self.layout.head_dim, rope)
        check_ends(self.layout, width, aggregate, projection)
        self.schedule, self.causal, self.projection = schedule, causal, projection
        self.aggregate, self.concat = aggregate, concat
        self.slices, self.groups = (mesh.slice, mesh.head) if mesh else (SINGLE, SINGLE)
        self.stream = stream or Replicated(mesh.model if mesh else SINGLE)
        self._add_parameters(width, qk_norm, mesh, dtype)
        if initialize:
            # Ranks that drew other seeds would hold slices of other weights, which are as random.
            self.init_weights(int(torch.randint(2**31, ())))

    def _add_parameters(self, width: int, qk_norm: bool, mesh: Mesh | None, dtype: torch.dtype | None) -> None:
        layout, weights = self.layout, mesh.weights if mesh else None
        parts, run = layout.parts, layout.head_dim // layout.parts
        columns = width // self.grid.ranks if self.projection == "block" else width
        rows = [Shard(0), Shard(2)]
        self.wq = empty_parameter((layout.heads, parts, run, columns), weights, rows, dtype)
        self.wk = empty_parameter((layout.kv_heads, parts, run, columns), weights, rows, dtype)
        self.wv = empty_parameter((layout.kv_heads, parts, run, columns), weights, rows, dtype)
        self.wo = (
            empty_parameter((width, layout.heads, parts, run), weights, [Shard(1), Shard(3)], dtype)
            if self.aggregate == "project"
            else None
        )
        norm = [Replicate(), Shard(1)]
        self.q_norm = empty_parameter((parts, run), weights, norm, dtype) if qk_norm else None
        self.k_norm = empty_parameter((parts, run), weights, norm, dtype) if qk_norm else None

    def init_weights(self, seed: int, name: str = "attention") -> None:
        """Fill the weights with values that depend on seed and name, and on neither mesh nor rank."""
        for key, parameter in self.named_parameters():
            if key.endswith("_norm"):
                fill(parameter, torch.ones(*parameter.shape))
            else:
                fan_in = self.wq.shape[-1] if key != "wo" else parameter[0].numel()
                fill_normal(parameter, fan_in**-0.5, seed, f"{name}.{key}")

    def forward(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Attention over the residual stream.

        Args:
            x: [B, T, E], or the stream's [N, E] or [N@model, E] together with `shape` = (B, T).

        Returns:
            A tensor of x's form.

        Raises:
            PartitionError: if the schedule cannot run this batch and length.
        """
        if shape is None:
            return self.forward(x.flatten(0, 1), (x.shape[0], x.shape[1])).view(x.shape)
        schedule = self.schedule_for(*shape)
        x = self.stream.enter(x, shape[0] * shape[1], "attention")
        with phase("attention.project_in"):
            qkv = self.project_in(x, shape, exact=schedule != "perslice")
        with phase("attention.schedule"):
            o = ATTEND[schedule](qkv, self.layout.heads // self.grid.n, self.slices, self.causal)
        with phase("attention.project_out"):
            return self.project_out(o)

    def schedule_for(self, batch: int, length: int) -> str:
        """The schedule that runs this batch and length.

        Raises:
            PartitionError: if the one that was asked for cannot.
        """
        if self.schedule == "auto":
            return cheapest_schedule(self.layout, self.grid, batch, length, self.causal, self.wq.element_size())
        check_schedule(self.schedule, self.layout, self.grid, batch, length)
        return self.schedule

    def project_in(self, x: Tensor, shape: tuple[int, int], exact: bool) -> Tensor:
        """x[N, E] -> qkv[B, T, (H + 2K)@head, D@slice], Q and K normed and rotated."""
        heads, kv_heads = self.layout.heads // self.grid.n, self.layout.kv_heads // self.grid.n
        # One matrix product for all three: on few rows and narrow shards three small ones cost more.
        weight = torch.cat([local(w).flatten(0, 2) for w in (self.wq, self.wk, self.wv)])
        qkv = F.linear(self._own_block(x) if self.projection == "block" else x, weight)
        qkv = qkv.view(*shape, heads + 2 * kv_heads, -1)
        if self.q_norm is None and not self.layout.rope:
            return qkv
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            norms = torch.cat(
                [local(w).flatten().expand(count, -1) for w, count in ((self.q_norm, heads), (self.k_norm, kv_heads))]
            )
            qk = self._rms_norm(qk, exact) * norms.to(qk.dtype)  # under autocast weights are wider than activations
        if self.layout.rope:
            qk = rotate_slice(qk, self.slices.rank, self.slices.size)
        return torch.cat([qk, v], dim=2)

    def _rms_norm(self, z: Tensor, exact: bool) -> Tensor:
        """z[B, T, H, D@slice] over the features of whole heads, or of narrow ones where the schedule has them."""
        squares = z.to(torch.promote_types(z.dtype, torch.float32)).pow(2).sum(-1, keepdim=True)
        features = z.shape[-1]
        if exact:
            squares = collectives.all_reduce(squares, self.slices, "attention.qk_norm")
            features *= self.slices.size
        return z * (squares / features + QK_NORM_EPS).rsqrt().to(z.dtype)

    def _own_block(self, x: Tensor) -> Tensor:
        """x[N, E] -> the E / (m n) features that this rank would own of an [H, P, D/P] tensor."""
        n, m, parts = self.grid.n, self.grid.m, self.layout.parts
        blocks = x.view(x.shape[0], n, self.layout.heads // n, parts, m, -1)
        return blocks[:, self.groups.rank, :, :, self.slices.rank].flatten(1)

    def project_out(self, o: Tensor) -> Tensor:
        """o[B, T, H@head, D@slice] -> the residual stream."""
        o = o.flatten(0, 1)
        if self.wo is not None:
            partial = F.linear(o.flatten(1), local(self.wo).flatten(1))
            return self.stream.leave(partial, "attention")
        o = o.unflatten(-1, (self.layout.parts, -1))
        if self.concat == "flat":
            whole = concat_flat(o, self.stream.axis, self.grid.m)
        else:
            whole = concat_hierarchical(o, self.slices, self.groups)
        return self.stream.leave_whole(whole.flatten(1), "attention")
