"""How far from the exact result rounding may take a right implementation. No torch; derived, not fitted.

**Model.** Every operation and every store rounds: fl(z) = z (1 + d), |d| <= u, u the unit roundoff of the dtype that
it happens in (2^-53, 2^-24, 2^-8, 2^-11 for fp64, fp32, bf16, fp16). Inputs are drawn so that they are exact in all
four, so nothing else is wrong. The d are taken to be independent and of mean 0 (Higham and Mary, A New Approach to
Probabilistic Rounding Error Analysis, 2019), so errors add as variances do, in units of u^2:

* a sum of k products, accumulated in a dtype of unit roundoff `a`: relative error sqrt(k) a, variance k a^2. (The i-th
  partial sum of independent terms is sqrt(i) large and is rounded once: k^2 / 2 for the square of the error of a sum
  of variance k.) 16-bit products are accumulated in fp32 by every kernel used here, so a = 2^-24 there.
* an intermediate that is stored in the run's dtype: u^2. There are `stores` of them on the way.
* p partial results added up between ranks in the run's dtype, as a ring does: the i-th of p sums has i / p of the
  variance and is rounded once: p / 2 u^2. (A direct exchange rounds once; a right run may do either.)
* scores enter an exponential, so their *absolute* error is the weights' relative one. Scores of these inputs have unit
  variance (under QK-norm as well), so that it counts like any other sum.

* QK-norm divides by a head's root mean square, and what is small there is large after: of M vectors of D features the
  smallest is about M^(-1/D) of the typical one, and its relative error as much larger. With 32 features that is
  nothing (1.3); with the 2 that a narrow head of `perslice` may have, it is. It multiplies what comes before the norm.

With lengths E (width), D (features of a head), S (keys), H D (all heads), N (tokens), F (MLP) the variances of a layer
are:

    forward     sums E + D + S + H D    stores: q and k and v, norm, RoPE, weights, o, y           partial sums p / 2
    backward    the forward, and sums E + D + S + S, stores: dO, dP, dS, dq and dk, RoPE, norm      partial sums m / 2
    d x         the backward, and sums (H + 2 K) D                                                  partial sums p / 2
    d weight    the backward, and a sum of N

and errors of layers in a row add. The bound is `WIDE` standard deviations. The measure is the largest deviation over
all entries relative to the largest entry: both are maxima of as many like-distributed numbers, so their ratio is that
of the standard deviations, within the log of their number, which WIDE covers with what the model leaves out (weights
not normal, rounding of exp and division, correlated terms).

**What it is relative to.** dS = P (dP - sum(P dP)) is a difference, of two equal numbers where a row sees one key; so
gradients on the way through the scores (wq, wk, QK-norm) may be nothing but rounding of terms that are not small. They
are held against what their terms are: P dP is what wv's gradient is summed of (dP = dO V^T, dV = P^T dO), so the scale
is wv's gradient where that is larger, times sqrt(H) for the norms, which sum over H heads as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from helix.certify.cases import Subject
from helix.partition.shape import TransformerShape

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
WIDE = 8.0
SCORED = ("wq", "wk", "q_norm", "k_norm")  # whose gradients come through the scores alone


@dataclass(frozen=True)
class Roundings:
    """What adds up on the way to a result.

    Args:
        sums: lengths of the sums inside a rank, together.
        stores: intermediates stored in the run's dtype.
        partials: ranks whose partial results are added up in it, together.
    """

    sums: float = 0.0
    stores: float = 0.0
    partials: float = 0.0

    def __add__(self, other: Roundings) -> Roundings:
        return Roundings(self.sums + other.sums, self.stores + other.stores, self.partials + other.partials)

    def __mul__(self, times: float) -> Roundings:
        return Roundings(self.sums * times, self.stores * times, self.partials * times)

    def bound(self, precision: str, least: str = "fp64") -> float:
        """`WIDE` standard deviations, relative.

        Args:
            least: what some of the work is done in whatever the run's precision, as routers are in fp32.
        """
        store = max(UNIT_ROUNDOFF[precision], UNIT_ROUNDOFF[least])
        accumulate = min(store, UNIT_ROUNDOFF["fp32"]) if ITEMSIZE[precision] == 2 else store
        variance = self.sums * accumulate**2 + (self.stores + self.partials / 2) * store**2
        return WIDE * math.sqrt(variance)


def attention_forward(subject: Subject, slices: int = 1) -> Roundings:
    """From the block's input to its output.

    Args:
        slices: m where heads are narrow, else 1.
    """
    shape = subject.shape
    project = Roundings(shape.width, 2) * _norm_gain(subject, slices)
    return project + Roundings(shape.head_dim + subject.length + shape.attention_width, 4, subject.grid.ranks)


def _norm_gain(subject: Subject, slices: int) -> float:
    """Of variances, by QK-norm: that of its smallest vector."""
    shape = subject.shape
    if not shape.qk_norm:
        return 1.0
    vectors = subject.batch * subject.length * (shape.heads + shape.kv_heads) * slices
    return float(vectors ** (2 * slices / shape.head_dim))


def attention_backward(shape: TransformerShape, length: int, m: int) -> Roundings:
    """From the output's gradient to those of q, k and v."""
    return Roundings(shape.width + shape.head_dim + 2 * length, 6, m)


def _input(shape: TransformerShape, ranks: int) -> Roundings:
    """From the gradients of q, k and v to the block's input's."""
    return Roundings((shape.heads + 2 * shape.kv_heads) * shape.head_dim, 1, ranks)


def _mlp(shape: TransformerShape, ranks: int) -> Roundings:
    """Of a block's MLP or expert with the norm before it; forward, and as much again backward."""
    return Roundings(2 * shape.width + shape.mlp_hidden, 4, ranks)


def layer_bounds(subject: Subject, precision: str, slices: int = 1) -> dict[str, float]:
    """Of the layer's output y, its input's gradient x, and each parameter's, by name."""
    shape, grid = subject.shape, subject.grid
    forward = attention_forward(subject, slices)
    backward = forward + attention_backward(shape, subject.length, grid.m)
    tokens = Roundings(subject.batch * subject.length, 1)
    norms = tokens + Roundings(tokens.sums * (shape.heads - 1), 0, grid.n)  # of all heads, added up over their groups
    found = {"y": forward, "x": backward + _input(shape, grid.ranks), "wo": forward + tokens}
    found |= dict.fromkeys(("wq", "wk", "wv"), backward + tokens) | dict.fromkeys(
        ("q_norm", "k_norm"), backward + norms
    )
    return {name: each.bound(precision) for name, each in found.items()}


def decode_bound(subject: Subject, precision: str, queries: float = 1.0) -> float:
    """Of an output: the forward, and the merge of m partial ones, each stored, weighed and added.

    Args:
        queries: times their usual size. So are the scores' errors then, and a score's error is its weight's relative
            one.
    """
    merge = Roundings(0, 3, subject.grid.m)
    return (attention_forward(subject) + merge).bound(precision) * queries


def model_bounds(subject: Subject, precision: str, slices: int = 1) -> tuple[float, float]:
    """Of the model's logits, and of any of its gradients: all go the whole way forward and at most all of it back."""
    shape, grid = subject.shape, subject.grid
    block = attention_forward(subject, slices) + _mlp(shape, grid.ranks)
    block += Roundings(2 * shape.width, 4)  # two norms, two residual sums
    forward = block * shape.layers + Roundings(2 * shape.width, 3, grid.ranks)
    back = attention_backward(shape, subject.length, grid.m) + _input(shape, grid.ranks) + _mlp(shape, grid.ranks)
    backward = (
        forward * 2 + back * shape.layers + Roundings(shape.vocab + subject.batch * subject.length, 2, grid.ranks)
    )
    least = "fp32" if shape.experts else "fp64"
    return forward.bound(precision, least), backward.bound(precision, least)


def scales(largest: dict[str, float], heads: int) -> dict[str, float]:
    """What each gradient's deviation is relative to, from every gradient's largest entry.

    Args:
        largest: by name; of a model "blocks.0.attention.wq" and so on.
    """
    out = {}
    for name, value in largest.items():
        prefix, _, last = name.rpartition(".")
        terms = 0.0
        if last in SCORED:
            terms = largest[f"{prefix}.wv" if prefix else "wv"] * (math.sqrt(heads) if last.endswith("norm") else 1)
        out[name] = max(value, terms)
    return out
