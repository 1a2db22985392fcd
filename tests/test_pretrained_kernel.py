"""Attention kernels without ranks: partial attention that is merged against the whole, in fp64 and 16 bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helix.pretrained import kernel
from helix.pretrained.kernel import Scoring, attention, partial


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random attention of `rows` queries to `keys` keys of `groups` KV heads, each with `repeat` queries."""

    batch: int
    groups: int
    repeat: int
    rows: int
    keys: int
    mask: str
    softcap: float | None
    dtype: torch.dtype = torch.float32

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(hash((self.rows, self.keys, self.groups)) % 1000)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        q = normal(self.batch, self.rows, self.groups * self.repeat, 8).transpose(1, 2)
        k, v = normal(self.batch, self.groups, self.keys, 8), normal(self.batch, self.groups, self.keys, 8)
        if self.mask == "none":
            return q, k, v, None
        mask = torch.rand(self.batch, 1, self.rows, self.keys, generator=generator) < 0.6
        mask[0, :, : self.rows // 2 + 1] = False  # padding sees nothing
        if self.mask == "added":
            return q, k, v, torch.zeros(mask.shape).to(self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        return q, k, v, mask

    def expected(self) -> Tensor:
        """In fp64, 0 where nothing is seen."""
        q, k, v, mask = self.draw()
        k, v = (z.repeat_interleave(self.repeat, 1).double() for z in (k, v))
        scores = q.double() @ k.mT * 0.3
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask if mask.dtype == torch.bool else mask < -1e3, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ v


PROBLEMS = st.builds(
    Problem,
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    repeat=st.integers(1, 3),
    rows=st.sampled_from([1, 2, 7]),
    keys=st.integers(1, 12),
    mask=st.sampled_from(["none", "seen", "added"]),
    softcap=st.sampled_from([None, 2.0]),
)


@settings(deadline=None, max_examples=60)
@given(PROBLEMS, st.integers(1, 5), st.sampled_from([1, 2**22]))
def test_parts_of_the_keys_merge_to_the_whole(problem: Problem, m: int, block: int) -> None:
    """Whatever of the tokens a rank has, none included; fp32 within 20 roundings of the fp64 answer."""
    q, k, v, mask = problem.draw()
    scoring = Scoring(0.3, problem.softcap)
    seen = ~problem.expected().eq(0).all(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK_SCORES", block)
        whole = attention(q, k, v, mask, scoring)
        parts = [
            partial(q, k[:, :, r::m], v[:, :, r::m], mask if mask is None else mask[..., r::m], scoring)
            for r in range(m)
        ]
    outs, sums = (torch.stack(z) for z in zip(*parts, strict=True))
    assert not outs.isnan().any()
    merged = (outs * sums.softmax(0)).sum(0)
    for found in (whole, merged):
        assert not found.isnan().any()
        torch.testing.assert_close(found[seen].double(), problem.expected()[seen], atol=3e-6, rtol=3e-6)
    if problem.mask == "seen":
        assert not merged[~seen].any()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("keys", [5, 9])
def test_causal_rows_are_the_last_ones(rows: int, softcap: float | None, keys: int) -> None:
    q, k, v, _ = Problem(2, 2, 2, rows, keys, "none", softcap).draw()
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)[None, None]
    scoring = Scoring(0.3, softcap)
    torch.testing.assert_close(attention(q, k, v, None, scoring, causal=True), attention(q, k, v, mask, scoring))


@pytest.mark.parametrize("mask", ["none", "seen"])
def test_16_bit_keys_merge_as_exactly_as_one_device_rounds(mask: str) -> None:
    """The parts' outputs and sums are added in fp32, so the answer is within the roundings of its parts."""
    problem = Problem(2, 2, 3, 7, 64, mask, None, torch.bfloat16)
    q, k, v, seen = problem.draw()
    scoring = Scoring(0.3)
    parts = [
        partial(q, k[:, :, r::4], v[:, :, r::4], seen if seen is None else seen[..., r::4], scoring) for r in range(4)
    ]
    outs, sums = (torch.stack(z) for z in zip(*parts, strict=True))
    assert sums.dtype == torch.float32
    merged = (outs.float() * sums.softmax(0)).sum(0)
    fused = F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    there = ~problem.expected().eq(0).all(-1)
    ours, theirs = ((z.double() - problem.expected())[there].abs().max() for z in (merged.to(q.dtype), fused))
    assert ours <= 1.5 * theirs + 2**-9


@pytest.mark.parametrize(("rows", "tolerance"), [(1, 1e-3), (20, 2e-2)])
def test_products_that_16_bits_do_not_hold_are_scaled_first(rows: int, tolerance: float) -> None:
    """Queries and keys of 256 numbers around 60, as fp16 has them: their products are above its 65504."""
    q, k, v = (torch.randn(1, 2, each, 256, generator=torch.Generator().manual_seed(each)) for each in (rows, 9, 9))
    q, k, v = (60 * q).half().requires_grad_(), (60 * k).half(), v.half()
    for softcap, scale in ((50.0, 2**-4), (None, 2**-13)):
        out, _ = partial(q, k, v, None, Scoring(scale, softcap))
        scores = q.double() @ k.double().mT
        assert scores.abs().max() > torch.finfo(torch.float16).max
        scores = scores * scale if softcap is None else torch.tanh(scores * scale / softcap) * softcap
        expected = scores.softmax(-1) @ v.double()
        assert (out.double() - expected).abs().max() < tolerance


def test_queries_whose_features_are_not_side_by_side() -> None:
    """As slices of one feature come from a gather; the flash kernel itself reads what lies beside them."""
    q, k, v = (torch.randn(2, 4, rows, 2, dtype=torch.float64) for rows in (1, 5, 5))
    strided = q.movedim(-1, 0).contiguous().movedim(0, -1)
    assert strided.stride(-1) != 1
    for found, expected in zip(*(partial(z, k, v, None, Scoring(0.5)) for z in (strided, q)), strict=True):
        assert torch.equal(found, expected)
