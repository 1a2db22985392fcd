"""Closed forms for one attention layer: FLOPs and bytes per collective, of one rank, forward.

The same formulas are what `auto` chooses by, what a run's counted bytes are held against, and what the
planner adds up. Bytes follow `helix.partition.wire`; the keys are the counters' own, "collective/name".
Letters as in `helix.partition.grid`; h_g = H/n, k_g = K/n, d_s = D/m.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from helix.partition import wire
from helix.partition.grid import Grid, HeadLayout, PartitionError
from helix.partition.schedules import EXACT, deal_sizes, refusal, row_chunks

# FLOPs that a rank computes in the time it sends one byte, for `auto`: an H100 at 60 % of 990 TFLOP/s and
# 370 GB/s of NVLink (DESIGN's roofline). The order of the schedules hardly depends on it.
FLOPS_PER_BYTE = 1600.0


@dataclass(frozen=True)
class AttentionCost:
    """What one attention layer costs one rank in one forward pass.

    Args:
        layout, grid: the attention and its partition.
        schedule: the schedule's name; not "auto".
        batch, length: B and T of one data replica.
        causal: whether half of the scores are skipped.
        itemsize: bytes of one number.
    """

    layout: HeadLayout
    grid: Grid
    schedule: str
    batch: int
    length: int
    causal: bool
    itemsize: int

    @property
    def _heads(self) -> int:
        return self.layout.heads // self.grid.n

    @property
    def _kv_heads(self) -> int:
        return self.layout.kv_heads // self.grid.n

    @property
    def _slice(self) -> int:
        return self.layout.head_dim // self.grid.m

    @property
    def _precise(self) -> int:
        """Bytes of the numbers that are summed in fp32 at least: scores and squares."""
        return max(4, self.itemsize)

    def bytes(self, feature_slice: int = 0, qk_norm: bool = False) -> Counter[str]:
        """Bytes that rank (i, `feature_slice`) sends inside its m-group, by collective.

        The slice matters only where m does not divide the samples or rows that are dealt.
        """
        out: Counter[str] = Counter()
        if self.grid.m == 1:
            return out
        out.update(getattr(self, f"_{self.schedule}_bytes")(feature_slice))
        if qk_norm and self.schedule != "perslice":
            numel = self.batch * self.length * (self._heads + self._kv_heads)
            out["all_reduce/attention.qk_norm"] = wire.all_reduce(numel, self.grid.m, self._precise)
        return out

    def _perslice_bytes(self, j: int) -> dict[str, int]:
        return {}

    def _batch_bytes(self, j: int) -> dict[str, int]:
        own = deal_sizes(self.batch, self.grid.m)[j]
        return self._dealt("qkv", self.batch, own, self.length * (self._heads + 2 * self._kv_heads)) | self._collected(
            own, self.length * self._heads
        )

    def _heads_bytes(self, j: int) -> dict[str, int]:
        tokens, m = self.batch * self.length, self.grid.m
        return self._dealt("qkv", m, 1, tokens * (self._heads + 2 * self._kv_heads) // m) | self._collected(
            1, tokens * self._heads // m
        )

    def _rows_bytes(self, j: int) -> dict[str, int]:
        own = sum(map(len, row_chunks(self.length, self.grid.m, self.causal)[j]))
        shard = self.batch * self.length * 2 * self._kv_heads * self._slice
        gathered = {"all_gather/attention.kv": wire.all_gather(shard, self.grid.m, self.itemsize)}
        return (
            gathered
            | self._dealt("q", self.length, own, self.batch * self._heads)
            | self._collected(own, self.batch * self._heads)
        )

    def _gather_bytes(self, j: int) -> dict[str, int]:
        shard = self.batch * self.length * (self._heads + self._kv_heads) * self._slice
        return {"all_gather/attention.qk": wire.all_gather(shard, self.grid.m, self.itemsize)}

    def _score_bytes(self, j: int) -> dict[str, int]:
        numel = self.batch * self._heads * self.length**2
        return {"all_reduce/attention.scores": wire.all_reduce(numel, self.grid.m, self._precise)}

    def _dealt(self, name: str, things: int, own: int, rows_per_thing: int) -> dict[str, int]:
        """All-to-all of `things`, each rows_per_thing x d_s numbers, of which the rank keeps `own`."""
        unit = rows_per_thing * self._slice
        return {f"all_to_all/attention.{name}": wire.all_to_all(things * unit, own * unit, self.itemsize)}

    def _collected(self, own: int, rows_per_thing: int) -> dict[str, int]:
        """All-to-all back: of each own thing, every other slice goes to its rank."""
        unit = own * rows_per_thing * self._slice
        return {"all_to_all/attention.out": wire.all_to_all(self.grid.m * unit, unit, self.itemsize)}

    def core_flops(self) -> int:
        """FLOPs of Q K^T and P V on the busiest rank of the m-group (a multiply-add is two)."""
        m, head_dim = self.grid.m, self.layout.head_dim
        pairs = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        unit = 2 * self._heads  # FLOPs of one (query, key) pair of one sample and feature, all own heads
        if self.schedule == "batch":
            return 2 * unit * max(deal_sizes(self.batch, m)) * pairs * head_dim
        if self.schedule == "rows":
            busiest = max(self._row_pairs(chunks) for chunks in row_chunks(self.length, m, self.causal))
            return 2 * unit * self.batch * busiest * head_dim
        if self.schedule == "gather":
            return unit * self.batch * pairs * (head_dim + self._slice)
        if self.schedule == "score":  # forms every score, masked or not
            return 2 * unit * self.batch * self.length**2 * self._slice
        return 2 * unit * self.batch * pairs * self._slice  # heads, perslice

    def _row_pairs(self, chunks: list[range]) -> int:
        if not self.causal:
            return sum(map(len, chunks)) * self.length
        return sum((run.start + run.stop + 1) * len(run) // 2 for run in chunks)

    def weight(self) -> float:
        """FLOPs, with bytes converted to them; what `auto` minimises."""
        busiest = max(sum(self.bytes(j).values()) for j in range(self.grid.m))
        return self.core_flops() + busiest * FLOPS_PER_BYTE


@lru_cache(maxsize=1024)
def cheapest_schedule(layout: HeadLayout, grid: Grid, batch: int, length: int, causal: bool, itemsize: int) -> str:
    """The exact schedule that costs least by the closed forms, of those that are legal.

    Raises:
        PartitionError: if none is (a batch or length of 0).
    """
    legal = [name for name in EXACT if refusal(name, layout, grid, batch, length) is None]
    if not legal or batch < 1 or length < 1:
        raise PartitionError(f"no exact schedule runs batch={batch}, length={length} on {grid.name}")
    return min(legal, key=lambda name: AttentionCost(layout, grid, name, batch, length, causal, itemsize).weight())
