"""A layout: how one model and one batch are laid over devices, by Helix or by one of the methods it competes with."""

from __future__ import annotations

from dataclasses import dataclass

from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions


@dataclass(frozen=True)
class Layout:
    """A layout of m * n * tokens * data * stage ranks.

    Args:
        method: how one replica's layers are laid over its ranks:
            helix      m feature slices x n head groups
            data       whole, on different samples
            tensor     whole heads on n ranks, an all-reduce after each half block (Megatron)
            ulysses    tokens on some ranks, which exchange them for whole heads around attention (DeepSpeed)
            context    tokens on some ranks, keys and values passed round a ring or gathered; heads on n in each
        m, n: of the grid; for the other methods m is 1 and n the ranks that share one replica's stage.
        data, stage: replicas and pipeline stages.
        tokens: ranks that cut sequences, each with the weights of its n; of ulysses and context alone.
        prefill: schedule of a pass over whole sequences; decode: how the cache is cut in a decoding step.
        microbatches: that each replica's samples are cut into.
        recompute: what a backward pass computes again: none, selective (the core attention, and what was gathered),
            or full (all of the forward pass).
        interleave: runs of layers of each pipeline stage (Megatron's virtual stages).
        sharded: whether tensor parallelism's stream is cut over tokens (Megatron's sequence parallelism). Helix's own
            transformer on 1 x n is just that; a pretrained model's stream is whole.
        kv_copies: how often each key/value head is held, where tensor parallelism has more ranks than those.
        shard_data: whether replicas share parameters, gradients and AdamW's moments out (parallel.shard_data, FSDP2);
            with them, ranks that cut sequences, which have the same weights.
        fused: whether attention is one kernel that never writes its scores.
    """

    method: str
    m: int = 1
    n: int = 1
    data: int = 1
    stage: int = 1
    tokens: int = 1
    prefill: str = "batch"
    decode: str = "heads"
    microbatches: int = 1
    recompute: str = "none"
    interleave: int = 1
    sharded: bool = False
    kv_copies: int = 1
    shard_data: bool = False
    fused: bool = True

    @property
    def grid(self) -> Grid:
        return Grid(self.m, self.n)

    @property
    def replica(self) -> tuple[object, ...]:
        """What decides how one replica's layers are cut, besides their schedules."""
        return self.method, self.m, self.n, self.tokens, self.sharded, self.kv_copies, self.fused

    @property
    def ranks(self) -> int:
        """Of the whole layout."""
        return self.stage_ranks * self.data * self.stage

    @property
    def stage_ranks(self) -> int:
        """Of one replica's stage."""
        return self.m * self.n * self.tokens

    @property
    def options(self) -> AttentionOptions:
        replicated = self.method == "tensor" and not self.sharded
        return AttentionOptions(self.prefill, residual="replicated" if replicated else "sharded")

    @property
    def sharers(self) -> int:
        """Ranks that hold the same key/value head in tensor parallelism and share the cache of it out by tokens."""
        return self.kv_copies if self.decode == "kvseq" else 1

    @property
    def cache(self) -> str:
        """How the m-group cuts the cache; heads where it is no group."""
        return self.decode if self.m > 1 else "heads"

    @property
    def name(self) -> str:
        """As `helix.config.methods` names methods, where it has a name."""
        if self.method == "data":
            return "single" if self.ranks == 1 else f"dp{self.data}"
        head = {
            "helix": f"helix_{self.m}x{self.n}",
            "tensor": f"tp{self.n}" + ("_sp" if self.sharded else ""),
            "ulysses": f"ulysses{self.tokens}",
            "context": (f"tp{self.n}_" if self.n > 1 else "") + f"cp{self.tokens}",
        }[self.method]
        stage = f"_pp{self.stage}" if self.stage > 1 else ""
        data = f"_dp{self.data}" if self.data > 1 else ""
        return head + stage + data

    def runs_in(self, mode: str) -> bool:
        """Whether infer.py or train.py takes this layout as its method today, not as a model of another's.

        Helix's grids have no pipeline stages, and answer prompts without replicas; of the others they run whole models
        and tensor parallelism, which answers none.
        """
        if mode == "generate":
            return self.stage == self.data == 1 and self.method in ("helix", "data")
        if self.method == "helix":
            return self.stage == 1
        if self.method == "tensor":
            return self.kv_copies == 1 and self.interleave == 1
        return self.method == "data"

    def at(self, **changes: object) -> Layout:
        """The same with some choices changed."""
        return Layout(**{**vars(self), **changes})  # searches call it often: dataclasses.replace takes twice as long
