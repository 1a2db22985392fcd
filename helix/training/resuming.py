"""Where a training goes on: from its own checkpoints after its ranks were started again, else from `ckpt`."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from helix.checkpoint.agree import from_rank_0
from helix.checkpoint.content import CheckpointError
from helix.checkpoint.manifest import CheckpointWarning, checkpoints, verify
from helix.config.schema import digest
from helix.config.train_schema import TrainConfig
from helix.parallel.checkpoint_callback import HelixCheckpoints
from helix.ranks.launch import Restart, first_said


@dataclass(frozen=True)
class Beginning:
    """What one start of the ranks begins with, the same on all of them.

    Args:
        run_dir: of the training; rank 0's, and the first start's.
        source: a checkpoint, or a folder of them, to go on from; None for a training from its first step.
        restart: None on the first start.
    """

    run_dir: Path
    source: Path | None
    restart: Restart | None

    @property
    def checkpoints(self) -> Path:
        """Where the training's own checkpoints are."""
        return self.run_dir / "checkpoints"


def begin(settings: TrainConfig, run_dir: Path) -> Beginning:
    """Agree on where this training's folder is, and from what it goes on; every rank calls it.

    The name of a launcher's other ranks' folder may be a second younger, and if torchrun starts the ranks again, all
    of their names are. What an earlier training left in the folder is not gone on from, even if none of this one's
    checkpoints is whole: then it begins as at first.
    """
    before = [path.name for path in checkpoints(run_dir / "checkpoints")]
    said, restart = first_said(f"training {digest(settings)}", json.dumps([str(run_dir), before]))
    first, before = json.loads(said)
    here = Beginning(Path(first), Path(settings.ckpt) if settings.ckpt is not None else None, restart)
    if restart is None:
        return here
    own = from_rank_0(lambda: _newest([path for path in checkpoints(here.checkpoints) if path.name not in before]))
    return replace(here, source=own) if own is not None else here


def _newest(found: list[Path]) -> Path | None:
    """The last whole one; warns (CheckpointWarning) of those after it."""
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            warnings.warn(str(error), CheckpointWarning, stacklevel=2)
            continue
        return path
    return None


@dataclass(frozen=True)
class Resumed:
    """A piece of a training that began where another had ended.

    Args:
        step: optimizer steps that were behind it.
        checkpoint: what it went on from; None if there was nothing, so that it began anew.
        reason: why the ranks were started again; None if `ckpt` said where to go on.
    """

    step: int
    checkpoint: str | None
    reason: str | None


class Resumptions(Callback):
    """Records each time that this training went on, and says so on stderr if its ranks were started again.

    It comes after `checkpoints` in the Trainer's list, which has loaded then.

    Attributes:
        pieces: that the training consists of, after its first; those of earlier starts come with the checkpoint.
    """

    def __init__(self, beginning: Beginning, loads: HelixCheckpoints | None) -> None:
        self.beginning, self.loads = beginning, loads
        self.pieces: list[Resumed] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, restart = self.loads and self.loads.resumed, self.beginning.restart
        if loaded is None and restart is None:
            return
        step, path = (loaded.step, str(loaded.path)) if loaded else (0, None)
        self.pieces.append(Resumed(step, path, restart.reason if restart else None))
        if restart is not None and dist.get_rank() == 0:
            goes_on = f"goes on after step {step}, from {path}" if path else "begins anew: it had no checkpoint yet"
            print(f"{restart.reason}; restart {restart.number}: training {goes_on}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"pieces": [asdict(piece) for piece in self.pieces]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pieces = [Resumed(**piece) for piece in state_dict["pieces"]]
