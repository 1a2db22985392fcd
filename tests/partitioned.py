"""A tiny model and the same one partitioned, on four ranks: what the tests of pretrained models' attention share."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pretrained
import torch
import transformers
from ranks import on_ranks
from torch import Tensor
from transformers import PreTrainedModel

from helix import Grid
from helix.comm.mesh import Mesh
from helix.partition.phases import Phases
from helix.pretrained.cuts import cuts
from helix.pretrained.helixify import helixify

# fp32 in another order: a few roundings of 1e-7 times sums of at most some hundred terms.
TOLERANCE = 1e-5
NEW = 7
FOUR, SQUARE, FLAT = Grid(4, 1), Grid(2, 2), Grid(1, 4)


@dataclass(frozen=True)
class Models:
    """A model, and the same one partitioned."""

    whole: PreTrainedModel
    parts: PreTrainedModel
    mesh: Mesh

    @classmethod
    def of(cls, mesh: Mesh, family: str, phases: Phases | None = None, **sizes: Any) -> Models:
        parts = helixify(pretrained.tiny(family, **sizes), mesh, phases or Phases())
        return cls(pretrained.tiny(family, **sizes), parts, mesh)

    def both(self, do: Callable[[PreTrainedModel], Any]) -> tuple[Any, Any]:
        return do(self.whole), do(self.parts)

    def generate(self, inputs: dict[str, Tensor], **how: Any) -> None:
        """The same tokens, greedily if not said otherwise."""
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | how
        expected, found = self.both(lambda model: model.generate(**inputs, **options))
        assert torch.equal(expected, found), f"{how}: {found.tolist()} instead of {expected.tolist()}"


def agree(expected: Tensor, found: Tensor, what: str = "logits") -> None:
    deviation = pretrained.error(found, expected)
    assert deviation < TOLERANCE, f"{what} are off by {deviation:.1e}"


def agree_gradients(models: Models) -> None:
    whole, own = dict(models.whole.named_parameters()), cuts(models.whole, models.mesh.grid, models.mesh.model.rank)
    for name, parameter in models.parts.named_parameters():
        expected = whole[name].grad
        assert expected is not None
        part = own[name].take(expected) if name in own else expected
        assert parameter.grad is not None, f"{name} has no gradient"
        scale = expected.abs().max()
        assert (parameter.grad - part).abs().max() <= TOLERANCE * scale, f"the gradient of {name}"


def _all(*checks: tuple[Any, ...]) -> list[str]:
    """What failed; the ranks go through the checks together."""
    meshes = {grid: Mesh(grid, data=4 // grid.ranks) for grid in (Grid(4, 1), Grid(2, 2), Grid(1, 4))}
    failures = []
    for check, grid, *arguments in checks:
        try:
            check(meshes[grid], *arguments)
        except Exception:
            failures.append(f"{check.__name__}({grid}, {arguments}): {traceback.format_exc(limit=-3)}")
    return failures


def run(*checks: tuple[Any, ...]) -> None:
    """Each check on its grid's mesh, in one launch of four ranks."""
    transformers.utils.logging.set_verbosity_error()
    for failures in on_ranks(4, _all, *checks, timeout_s=60):
        assert not failures, "\n".join(failures)
