"""What devices are to do, and what a layout costs them."""

from __future__ import annotations

from dataclasses import dataclass

from helix.config.schema import ITEMSIZE
from helix.planner.layout import Layout
from helix.planner.seconds import Seconds

# Part of a device's memory that a layout may fill: the rest is the allocator's slack, the driver's and the libraries'
# own. A rule of thumb, not measured here.
HEADROOM = 0.92


@dataclass(frozen=True)
class Work:
    """What the devices are to do.

    Args:
        mode: forward (one pass over whole sequences, as infer.py measures), train (a step of AdamW), or generate
            (a pass over prompts, then tokens one by one).
        batch: sequences over all replicas.
        length: tokens of a sequence, or of a prompt.
        new_tokens: to generate for each; 0 in the other modes.
        precision: in Lightning's names.
        commonest: the commonest token's part of all tokens, which go to the same experts; 0 where nobody knows.
    """

    mode: str
    batch: int
    length: int
    new_tokens: int = 0
    precision: str = "bf16-true"
    commonest: float = 0.0

    @property
    def itemsize(self) -> int:
        """Bytes of one number in the stream."""
        return ITEMSIZE.get(self.precision, 2)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one stored parameter: mixed precision keeps fp32."""
        return ITEMSIZE.get(self.precision, 4)


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank.

    Args:
        weights: with `shard_data` a rank's own part, and what it gathers at once.
        state: gradients and the optimizer's moments.
        activations: held at once in a step, or kept for the backward pass.
        cache: keys and values at the end of generation.
    """

    weights: int
    state: int
    activations: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.activations + self.cache


@dataclass(frozen=True)
class Estimate:
    """A layout's cost.

    Args:
        seconds: of a step; of generation, of the whole of it.
        tokens_per_s: of all devices; of generation, tokens that come out.
        ttft_s, tpot_s: time to the first token, and of each after it; None but in generation.
    """

    layout: Layout
    seconds: Seconds
    memory: Memory
    tokens_per_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def latency_s(self) -> float:
        """What a user waits for: a step, or each further token."""
        return self.seconds.total if self.tpot_s is None else self.tpot_s
