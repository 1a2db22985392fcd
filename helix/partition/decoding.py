"""Closed forms for a pretrained model that generates text: bytes per collective, cache and weights of one rank.

What a run's counted bytes are held against. Bytes follow `helix.partition.wire`; the keys are the counters' own,
"collective/name". Letters as in `helix.partition.grid`; p = m * n. A decode step is a prefill of one token but for
the exchange inside attention, and none of its terms knows the length of the context.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from helix.partition import wire
from helix.partition.architectures import FAMILIES
from helix.partition.families import PretrainedShape, expert_share
from helix.partition.grid import Grid
from helix.partition.phases import Phases, stride_of
from helix.partition.schedules import row_chunks


@dataclass(frozen=True)
class GenerationCost:
    """What a causal model costs one rank.

    Args:
        shape, grid: the model and its partition.
        phases: resolved, no "auto".
        batch: samples of one data replica.
        itemsize: bytes of one number of the weights and activations.
    """

    shape: PretrainedShape
    grid: Grid
    phases: Phases
    batch: int
    itemsize: int

    def prefill_bytes(self, length: int, rank: int = 0, logits: int = 1) -> Counter[str]:
        """Bytes that a rank sends for the first `length` tokens of each sample.

        Args:
            rank: matters for `rows`, whose shares differ where m does not divide the rows.
            logits: tokens of each sample whose logits are gathered; generating needs the last one's only.
        """
        _, feature_slice = self.grid.coordinates(rank)
        own = self._outputs_of(length) // self.grid.m
        if self.phases.prefill == "rows":
            chunks = row_chunks(length, self.grid.m, causal=True)
            own = self._outputs_of(sum(map(len, chunks[feature_slice])))
        return self._call(length, logits, Counter({"all_to_all/attention.out": self._exchanged(own)}))

    def step_bytes(self, tokens: int = 1) -> Counter[str]:
        """Bytes that a rank sends to decode the next `tokens` of each sample, whatever came before.

        Args:
            tokens: more than 1 where a prompt comes in chunks, or a conversation goes on.
        """
        if self.phases.decode == "kvseq":
            return self._call(tokens, 1, Counter({"all_to_all/attention.merge": self._merged(tokens)}))
        own = self._outputs_of(tokens) // self.grid.m
        return self._call(tokens, 1, Counter({"all_to_all/attention.out": self._exchanged(own)}))

    def _call(self, tokens: int, logits: int, exchange: Counter[str]) -> Counter[str]:
        shape, grid, each = self.shape, self.grid, self.batch * tokens
        summed = wire.all_reduce(each * shape.width, grid.ranks, self.itemsize)
        heads = (shape.heads + 2 * shape.kv_heads) // grid.n
        qkv = wire.all_gather(each * heads * shape.head_dim // grid.m, grid.m, self.itemsize)
        layer = exchange + Counter(
            {"all_gather/attention.qkv": qkv, "all_reduce/attention.leave": summed, "all_reduce/mlp.leave": summed}
        )
        out = Counter({key: shape.layers * nbytes for key, nbytes in layer.items()})
        share = -(-shape.vocab // grid.ranks)
        out["all_gather/head.leave"] = wire.all_gather(self.batch * logits * share, grid.ranks, self.itemsize)
        for name in ("embedding", "positions")[: len(FAMILIES[shape.family].embeddings)]:
            out[f"all_reduce/{name}.leave"] = summed
        return +out

    def _outputs_of(self, tokens: int) -> int:
        """Heads' outputs in a head group, of so many tokens of each sample."""
        return self.batch * tokens * self.shape.heads // self.grid.n

    def _exchanged(self, own: int) -> int:
        """Of a rank's own whole outputs, the slices that other ranks want."""
        numel = own * self.shape.head_dim
        return wire.all_to_all(numel, numel // self.grid.m, self.itemsize)

    def _merged(self, tokens: int) -> int:
        """Partial outputs of all tokens with their log-sum-exps, in fp32 at least."""
        share = self._outputs_of(tokens) * (self.shape.head_dim // self.grid.m + 1)
        return wire.all_to_all(self.grid.m * share, share, max(4, self.itemsize))

    def cache_bytes(self, tokens: int, rank: int = 0) -> int:
        """Bytes of the keys and values that a rank holds of `tokens` tokens of each sample.

        Exact where no layer has a window, else a bound. All ranks together hold each number once.
        """
        _, feature_slice = self.grid.coordinates(rank)
        if self.phases.decode == "kvseq":
            samples, heads = self.batch, self.shape.kv_heads // self.grid.n
            numbers = samples * heads * stride_of("kvseq", self.grid.m, feature_slice).count(0, tokens)
        else:
            numbers = self.batch * self.shape.kv_heads * tokens // self.grid.ranks
        return 2 * self.shape.layers * numbers * self.shape.head_dim * self.itemsize

    def weight_bytes(self) -> int:
        """Bytes of the matrices and the layers' norms that a rank holds, with the zeros that make shares even.

        Of Llama and Mixtral these are all parameters; others have biases, norms of heads, or more or fewer norms.
        """
        shape, p, family = self.shape, self.grid.ranks, FAMILIES[self.shape.family]
        attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim // p * shape.width
        if shape.experts:
            rows = shape.experts * 3 * expert_share(shape.mlp_hidden, p, self.itemsize)
            routers = shape.experts + (1 if shape.shared_hidden else 0)  # and the gate of the MLP beside
            mlp = (rows + routers + 3 * -(-shape.shared_hidden // p)) * shape.width
        else:
            mlp = (len(family.mlp.columns) + 1) * -(-shape.mlp_hidden // p) * shape.width
        entries = (1 if shape.tied else 2) * -(-shape.vocab // p)
        if len(family.embeddings) > 1:
            entries += -(-shape.context // p)
        ends = (entries + 1) * shape.width
        return (shape.layers * (attention + mlp + 2 * shape.width) + ends) * self.itemsize
