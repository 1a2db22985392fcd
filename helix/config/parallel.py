"""How one model is laid over ranks, as a command is told."""

from __future__ import annotations

from dataclasses import dataclass

from helix.config.bounds import at_least, one_of
from helix.partition.phases import DECODE
from helix.partition.placement import AUTO as AUTO_PLACEMENT
from helix.partition.placement import PLACEMENTS
from helix.partition.schedules import SCHEDULES

METHODS = ("helix", "single", "data", "tensor")
PEERS = ("context", "ulysses", "autotp", "transformers")  # of other projects: baselines only
AUTO = "auto"  # in place of a method, which the planner is to choose
# What a layout can be the best in; ttft and tpot are of generated text.
GOALS = ("throughput", "latency", "memory", "ttft", "tpot")
DECODES = ("auto", *DECODE)  # how a head group's cache is cut over its m ranks


@dataclass
class ParallelConfig:
    """How one model is laid over ranks: m feature slices x n head groups x data replicas x pipeline stages.

    For other methods than Helix m is 1, and n the ranks that share one replica's stage. `concat` matters to
    `aggregate=concat` only; of the attention's options the others read `residual` alone (tensor parallelism).
    `microbatches` is the number that a pipeline cuts a step into. `helix.config.methods` has each method's name.
    While text is generated, `schedule` is of the prompt and `decode` of the tokens after it. `placement` is of the m
    slices on several hosts (`helix.partition.placement`), for all methods of a launch.

    `devices` and `goal` are of `method=auto` alone, which never runs: `helix.command.choose` puts there what the
    planner chooses for so many devices, the best in that goal. Sizes that are to be chosen are 0 until then.
    """

    method: str = one_of("helix", METHODS)
    m: int = at_least(1)
    n: int = at_least(1)
    data: int = at_least(1, 1)
    stage: int = at_least(1, 1)
    schedule: str = one_of("auto", ("auto", *SCHEDULES))
    decode: str = one_of("auto", DECODES)
    aggregate: str = one_of("project", ("project", "concat"))
    concat: str = one_of("hierarchical", ("hierarchical", "flat"))
    projection: str = one_of("column", ("column", "block"))
    residual: str = one_of("sharded", ("sharded", "replicated"))
    microbatches: int = at_least(1, 4)
    placement: str = one_of(AUTO_PLACEMENT, PLACEMENTS)
    devices: int | None = at_least(1, None)
    goal: str | None = one_of(None, GOALS)

    @property
    def ranks(self) -> int:
        """Processes of the whole job."""
        return self.m * self.n * self.data * self.stage
