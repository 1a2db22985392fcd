"""What `python -m helix plan` is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from helix.config.parallel import GOALS
from helix.config.schema import HardwareConfig, ModelConfig, WorkloadConfig, at_least, one_of
from helix.config.train_schema import PRECISIONS

MODES = ("forward", "train", "generate")
RECOMPUTE = ("none", "selective", "full")


@dataclass
class PlanParallelConfig:
    """Sizes that are given rather than searched; null leaves one free.

    Args:
        shard_data: whether replicas share parameters, gradients and AdamW's moments out (FSDP2), in training.
        recompute: what a backward pass computes again, in training; Helix's own training computes nothing again.
        runnable: only layouts that infer.py and train.py take as a method.
    """

    m: int | None = at_least(1, None)
    n: int | None = at_least(1, None)
    data: int | None = at_least(1, None)
    stage: int | None = at_least(1, None)
    shard_data: bool = False
    recompute: str = one_of("none", RECOMPUTE)
    runnable: bool = False


@dataclass
class PlanConfig:
    """Everything that a plan is told.

    Args:
        devices: null means as many as the hardware's system has.
        mode: forward (one pass over whole sequences, as infer.py measures), train, or generate.
        new_tokens: to generate for each of the workload's sequences, which are prompts then.
        goal: what the layout is to be the best in; ttft and tpot are generation's.
    """

    model: ModelConfig = MISSING
    hardware: HardwareConfig = MISSING
    workload: WorkloadConfig = MISSING
    parallel: PlanParallelConfig = field(default_factory=PlanParallelConfig)
    devices: int | None = at_least(1, None)
    mode: str = one_of("forward", MODES)
    new_tokens: int = at_least(1, 256)
    goal: str = one_of("throughput", GOALS)
    precision: str = one_of("bf16-true", PRECISIONS)
