"""Finding the parts of a Hugging Face model by the paths that its family gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from helix.comm.mesh import Mesh
from helix.partition.architectures import Experts, Family, Feedforward
from helix.partition.families import describe, family_named
from helix.partition.grid import PartitionError


def family_of(model: PreTrainedModel) -> Family:
    """The model's family, with the paths that hold in this model.

    A family's paths are those of its model with a language head. Others call the same base by another name, and the
    base alone has no name for itself.

    Raises:
        PartitionError: if Helix does not know the family.
    """
    family = family_named(model.config.model_type)
    usual, base = family.layers.partition(".")[0], model.base_model
    own = next((f"{name}." for name, child in model.named_children() if child is base), "")

    def here(path: str) -> str:
        return own + path.removeprefix(f"{usual}.") if path.startswith(f"{usual}.") else path

    return replace(
        family,
        layers=here(family.layers),
        embeddings=tuple(map(here, family.embeddings)),
        heads=tuple(path for path in map(here, family.heads) if has(model, path)),
    )


def is_partitioned(model: nn.Module) -> bool:
    """Whether a model, or one inside it, is."""
    return any(hasattr(module, "helix") for module in model.modules())


def mesh_of(model: nn.Module) -> Mesh:
    """The mesh that a model is partitioned over.

    Raises:
        PartitionError: if the model is whole.
    """
    mesh = getattr(model, "helix", None)
    if not isinstance(mesh, Mesh):
        raise PartitionError(f"this {type(model).__name__} is not partitioned; call helixify(model, mesh) first")
    return mesh


def head_dim(model: PreTrainedModel) -> int:
    return describe(model.config.to_dict()).head_dim


def layers_of(model: nn.Module, family: Family) -> list[nn.Module]:
    return list(model.get_submodule(family.layers).children())


def experts_of(layer: nn.Module, family: Family) -> Experts | None:
    """The layer's experts; a family that has some may have layers without."""
    return family.experts if family.experts is not None and has(layer, family.experts.module) else None


def feedforward_of(layer: nn.Module, family: Family) -> Feedforward | None:
    """The layer's MLP, or the one beside its experts."""
    experts = experts_of(layer, family)
    return family.mlp if experts is None else experts.shared


def has(root: nn.Module, path: str) -> bool:
    try:
        return isinstance(root.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter that is there, by its name in the module."""
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is [in, out]."""
    return isinstance(linear, Conv1D)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    first, second = tensor(linear, "weight").shape
    return (second, first) if is_transposed(linear) else (first, second)


def same_tensors(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of parameters that are another's too, each with the first name that it has."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            yield name, first[id(parameter)]
