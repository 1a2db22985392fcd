"""Which function of its weights a transformer computes: a few choices of its layout change it, most do not."""

from __future__ import annotations

from dataclasses import dataclass

from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions


@dataclass(frozen=True)
class Function:
    """What a layout makes of whole weights: all exact ones make the same, wherever they run.

    Args:
        slices: m where `perslice` computes attention with heads * m narrow heads, else 1.
        block: the grid whose block-diagonal projections are meant literally, else None.
        projects: whether there is a W_O.
    """

    slices: int = 1
    block: Grid | None = None
    projects: bool = True

    def options(self) -> dict[str, str | int]:
        """The options of a layout that computes it; `schedule=auto` stands for every exact schedule.

        >>> Function(slices=4).options()
        {'schedule': 'perslice', 'm': 4, 'projection': 'column', 'aggregate': 'project'}
        """
        out: dict[str, str | int] = {"schedule": "auto" if self.slices == 1 else "perslice"}
        if self.slices > 1:
            out["m"] = self.slices
        if self.block is not None:
            out |= {"m": self.block.m, "n": self.block.n}
        out["projection"] = "column" if self.block is None else "block"
        out["aggregate"] = "project" if self.projects else "concat"
        return out


def function_of(options: AttentionOptions, grid: Grid) -> Function:
    """The function of a layout."""
    return Function(
        slices=grid.m if options.schedule == "perslice" else 1,
        block=grid if options.projection == "block" else None,
        projects=options.aggregate == "project",
    )
