"""The loss scale of fp16 training: agreed over every axis, and following the partition's width.

fp16 has no magnitude below 6e-8, where many gradients lie, so the loss is multiplied by a scale before backward
and the gradients divided by it after. Where some gradient overflowed the step is skipped and the scale halved;
after `interval` steps without, it is doubled. A rank that decided this for itself would step alone, and its
scale with it: whether any gradient overflowed is summed over the model, stage and data axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from helix.comm import transport
from helix.comm.mesh import Mesh
from helix.partition.grid import Grid
from helix.ranks.process_group import own_device

# torch.amp.GradScaler's.
START = 2.0**16
INTERVAL_STEPS = 2000
GROWTH, BACKOFF = 2.0, 0.5
SCALINGS = ("adaptive", "ordinary")


class LossScaler:
    """A dynamic loss scale, the same on every rank.

    Args:
        start: the first scale; a power of two, so that scaling rounds nothing.
        interval: steps without overflow after which it is doubled.

    Attributes:
        value: the scale.
        overflowed: whether some rank's gradients of this step were not finite.
    """

    def __init__(self, start: float = START, interval: int = INTERVAL_STEPS) -> None:
        self.value, self.interval = start, interval
        self.overflowed = False
        self._finite_steps = 0

    def scale(self, loss: Tensor) -> Tensor:
        """loss -> loss * scale, in fp32 at least: the scale alone may exceed fp16's largest number."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value

    def unscale(self, gradients: Mapping[torch.dtype, list[Tensor]], mesh: Mesh) -> None:
        """Divide this rank's shards by the scale, in place; agree on whether any rank's are not finite."""
        found = torch.zeros((), dtype=torch.float32, device=own_device(mesh.device_type))
        inverse = torch.full((), 1 / self.value, dtype=torch.float32, device=found.device)
        for shards in gradients.values():
            torch._amp_foreach_non_finite_check_and_unscale_(shards, found, inverse)
        for axis in (mesh.model, mesh.stage, mesh.data):
            if axis.size > 1:
                found = transport.all_reduce(found, axis, f"overflow.{axis.name}")
        self.overflowed = bool(found.item())

    def update(self) -> None:
        """Follow the step that `unscale` judged: back off, or grow when it is time."""
        if self.overflowed:
            self.value *= BACKOFF
            self._finite_steps = 0
            return
        self._finite_steps += 1
        if self._finite_steps == self.interval:
            self.value *= GROWTH
            self._finite_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value, "finite_steps": self._finite_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over scale and count. The interval stays this grid's own."""
        self.value, self._finite_steps = float(state["scale"]), int(state["finite_steps"]) % self.interval


def make_scaler(grid: Grid, scaling: str) -> LossScaler:
    """The scaler of a grid.

    The papers ask for "gradient scaling factors .. computed based on the actual partition dimensions" and give no
    formula. The rule here: a rank's gradient of a block's input is a sum over its own H/n * D/m features (its
    F/(m n) of the MLP's), 1 / (m n) of the summands of the single device's. Of independent summands such a
    partial sum is smaller by s = sqrt(m n), so it underflows s times sooner, before the ranks' sums are added
    up. Hence

        start = 2^16 * s                s rounded to a power of two
        interval = 2000 * s steps

    The start keeps the partial sums where the single device's whole ones lie. The reduced sums are as large as
    ever, so the scale has s times less room above it and tries to grow s times less often. On a 1 x 1 grid it is
    the ordinary scaler. A heuristic: within some steps the back-off finds the same ceiling from either start.

    Args:
        grid: m slices by n head groups.
        scaling: "adaptive", or "ordinary" for torch's own start and interval on every grid.

    Raises:
        ValueError: if it is neither.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling} is not known; legal: {', '.join(SCALINGS)}")
    step = 2 ** round(math.log2(grid.ranks) / 2) if scaling == "adaptive" else 1
    return LossScaler(START * step, INTERVAL_STEPS * step)
