"""Plans for well-known models on a few numbers of devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from helix.config.schema import HardwareConfig, Misfit
from helix.partition.grid import PartitionError
from helix.planner.candidates import Asked
from helix.planner.plan import Plan, plan
from helix.planner.search import times_as_good
from helix.planner.work import Estimate, Work

# Those of conf/model/known, the largest first.
MODELS = ("deepseek_v3", "qwen3_235b_a22b", "llama3_70b", "gemma4_global", "smollm2")
DEVICES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One model on one number of devices.

    Args:
        plan: None where no layout fits, or Helix does not partition the model: `refusal` says why.
    """

    model: str
    devices: int
    plan: Plan | None
    refusal: str = ""

    @property
    def sliced(self) -> Estimate | None:
        """The best layout with m > 1, if one fits."""
        if self.plan is None:
            return None
        return next((one for one in self.plan.rivals if one.layout.m > 1), None)

    @property
    def ratio(self) -> float | None:
        """How many times as good as the best of all others the best layout with m > 1 is; None without either."""
        if self.plan is None or self.sliced is None:
            return None
        other = next((one for one in self.plan.rivals if one.layout.m == 1), None)
        if other is None:
            return None
        return times_as_good(self.plan.goal, self.sliced, other)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the layout to take, or why there is none."""
        found = {} if self.plan is None else self.plan.as_dict()
        return {
            "model": self.model,
            "devices": self.devices,
            "refusal": self.refusal,
            "sliced": None if self.sliced is None else self.sliced.layout.name,
            "ratio": self.ratio,
            **{key: found.get(key) for key in ("goal", "work", "best", "because", "reasons", "error")},
        }


def rows(
    hardware: str | HardwareConfig,
    work: Work,
    goal: str,
    asked: Asked,
    models: Sequence[str] = MODELS,
    devices: Sequence[int] = DEVICES,
) -> Iterator[Row]:
    """Each model on each number of devices; a model that is refused by name has one row.

    Raises:
        ConfigError: if the hardware or the goal cannot be planned for.
    """
    for model in models:
        for count in devices:
            try:
                found = plan(
                    model, hardware, count, mode=work.mode, batch=work.batch, length=work.length,
                    new_tokens=work.new_tokens, precision=work.precision, goal=goal, asked=asked,
                    commonest=work.commonest,
                )  # fmt: skip
            except PartitionError as error:
                yield Row(model, count, None, str(error))
                break
            except Misfit as error:
                yield Row(model, count, None, str(error))
            else:
                yield Row(model, count, found)
