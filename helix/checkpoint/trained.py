"""What a checkpoint's weights are of: a model's shape, and which function of them was trained. Knows no torch.

Names and shapes of the weights do not say it all: with as many heads, `perslice` on 4 slices is another function of
the same weights than the exact attention is, and so are block projections on another grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from helix.checkpoint.content import About, CheckpointError
from helix.partition.function import Function
from helix.partition.grid import Grid, PartitionError
from helix.partition.shape import TransformerShape


@dataclass(frozen=True)
class Trained:
    """A transformer, as far as its weights mean something."""

    shape: TransformerShape
    function: Function = field(default_factory=Function)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        block = self.function.block
        function = {**asdict(self.function), "block": None if block is None else [block.m, block.n]}
        return {"shape": asdict(self.shape), "function": function}

    def keys(self) -> dict[str, Any]:
        """Every key that it is made of, by its name in configs."""
        model = {f"model.{key}": value for key, value in asdict(self.shape).items() if key != "experts"}
        model |= {"model.kind": "moe" if self.shape.experts else "dense", "model.experts": self.shape.experts}
        return model | {f"parallel.{key}": value for key, value in self.function.options().items()}


def trained(about: About) -> dict[str, Trained]:
    """The transformers of a checkpoint by the names that they have in it; none if whoever saved it told of none.

    Raises:
        CheckpointError: if what it tells of them makes no sense.
    """
    return {name: parse(each) for name, each in about.models.items()}


def parse(content: Mapping[str, Any]) -> Trained:
    """Undo `Trained.plain`.

    Raises:
        CheckpointError: if it is no description of a transformer; it may be a stranger's.
    """
    try:
        shape, function = content["shape"], content["function"]
        if any(type(shape[spec.name]).__name__ != spec.type for spec in fields(TransformerShape)):
            raise TypeError("a size that is no number")
        block = None if function["block"] is None else Grid(*map(int, function["block"]))
        made = Function(int(function["slices"]), block, bool(function["projects"]))
        return Trained(TransformerShape(**shape), made)
    except (KeyError, TypeError, ValueError, PartitionError) as error:
        raise CheckpointError(f"what the checkpoint says of its model makes no sense ({error})") from None


def check_same(there: Trained, here: Trained, where: Path | str, what: str = "the model here") -> None:
    """Check that a model is the one whose weights a checkpoint has.

    Raises:
        CheckpointError: with what differs, on both sides, in one sentence.
    """
    if there == here:
        return
    saved, own = there.keys(), here.keys()
    differing = [key for key in [*saved, *(own.keys() - saved.keys())] if saved.get(key) != own.get(key)]
    said = " ".join(f"{key}={saved[key]}" for key in differing if key in saved)
    other = " ".join(f"{key}={own[key]}" for key in differing if key in own)
    same = "" if there.shape != here.shape else ", which is another function of the same weights"
    raise CheckpointError(f"{where} was trained with {said}, and {what} has {other}{same}; set {said}")
