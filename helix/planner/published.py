"""The time model against published tables that no figure of it was fitted to, with every row's error."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml  # type: ignore[import-untyped]

from helix.partition.shape import TransformerShape
from helix.planner.catalogue import hardware
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import machine_of
from helix.planner.work import Work

FOLDER = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Row:
    """One published figure, and the model's.

    Args:
        model, layout: by the table's name and the layout's own.
        measured, modelled: in the table's quantity.
        calculon: Calculon's figure, where it has one.
        is_speed: whether the figures are speeds; times if not.
    """

    model: str
    layout: str
    recompute: str
    measured: float
    modelled: float
    calculon: float | None
    is_speed: bool

    @property
    def error(self) -> float:
        """Part by which the modelled figure is above the measured one."""
        return self.modelled / self.measured - 1

    @property
    def reached(self) -> float:
        """Part of the modelled speed that was measured."""
        return self.measured / self.modelled if self.is_speed else self.modelled / self.measured


@dataclass(frozen=True)
class Table:
    """A published table.

    Args:
        source, quantity: in words.
    """

    name: str
    source: str
    quantity: str
    rows: tuple[Row, ...]

    @property
    def median_error(self) -> float:
        """Median absolute error of the rows."""
        return median(abs(row.error) for row in self.rows)

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: abs(row.error))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every row with its error."""
        rows = [asdict(row) | {"error": row.error} for row in self.rows]
        return asdict(self) | {"rows": rows, "median_error": self.median_error}


def reached() -> tuple[float, float]:
    """The least and the most of a modelled speed that was measured, over all rows of all tables."""
    parts = [row.reached for one in tables() for row in one.rows]
    return min(parts), max(parts)


def tables() -> list[Table]:
    """Every published table, recomputed."""
    return [table(path.stem) for path in sorted(FOLDER.glob("*.yaml"))]


@cache
def table(name: str) -> Table:
    """One of them, by the name of its file."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    rows = tuple(_row(content, row) for row in content["rows"])
    return Table(name, content["source"], content["quantity"], rows)


def _row(content: dict[str, Any], row: dict[str, Any]) -> Row:
    shape = _shape(content, row["model"])
    layout = _layout(row)
    machine = machine_of(hardware(content["hardware"]), "16-mixed", layout.ranks)
    work = Work("train", row["batch"], content["length"], precision="16-mixed")
    seconds = Estimator(shape, machine, work).estimate(layout).seconds.total
    is_speed = content["quantity"].startswith("TFLOP/s")
    modelled = _flops(shape, work) / seconds / layout.ranks / 1e12 if is_speed else seconds
    calculon = row.get("calculon")
    return Row(row["model"], layout.name, row["recompute"], row["measured"], modelled, calculon, is_speed)


def _shape(content: dict[str, Any], name: str) -> TransformerShape:
    size = content["models"][name]
    width, heads = size["width"], size["heads"]
    return TransformerShape(
        size["layers"], width, heads, heads, width // heads, 4 * width, content["vocab"], rope=False, tied=True
    )


def _layout(row: dict[str, Any]) -> Layout:
    """Megatron's: before FlashAttention, so that attention writes its scores.

    Tensor parallelism on a token-sharded stream, which `selective` rows have, is Helix on 1 x n.
    """
    return Layout(
        "helix" if row["recompute"] == "selective" else "tensor",
        n=row["tensor"],
        data=row["data"],
        stage=row["stage"],
        microbatches=row["batch"] // row["data"] // row["micro"],
        recompute=row["recompute"],
        interleave=row["interleave"],
        fused=False,
    )


def _flops(shape: TransformerShape, work: Work) -> float:
    """Narayanan et al., equation 3: 96 B s l h^2 (1 + s / 6h + V / 16 l h), with the forward pass twice."""
    layers, width = shape.layers, shape.width
    bracket = 1 + work.length / (6 * width) + shape.vocab / (16 * layers * width)
    return 96 * work.batch * work.length * layers * width**2 * bracket
