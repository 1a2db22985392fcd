"""A mixture of experts, each cut over all ranks; routing is the model's own, on every rank alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from helix.comm import collectives
from helix.comm.mesh import Axis
from helix.partition.architectures import Experts
from helix.pretrained.layers import Columns, Entry, Part
from helix.pretrained.structure import is_transposed, put


def cut_experts(layer: nn.Module, names: Experts, axis: Axis, parts: dict[str, nn.Parameter]) -> None:
    """Cut a layer's experts in place, with the MLP beside them; one sum makes the output of both whole.

    Args:
        parts: by their names in the layer.
    """
    module = layer.get_submodule(names.module)
    for name in (names.gate_up, names.down):
        setattr(module, name, parts[f"{names.module}.{name}"])
    entry = Entry(axis, "mlp")
    module.register_forward_pre_hook(_entering(entry), with_kwargs=True)
    if names.shared is not None:
        own = Entry(axis, "shared")
        for path in names.shared.columns:
            put(layer, path, Columns(parts[f"{path}.weight"], None, is_transposed(layer.get_submodule(path)), own))
        row = names.shared.row
        put(layer, row, Part(parts[f"{row}.weight"], None, is_transposed(layer.get_submodule(row))))
    if names.shared_gate is not None:
        layer.get_submodule(names.shared_gate).register_forward_hook(_scaling(Entry(axis, "gate")))
    layer.get_submodule(names.block).register_forward_hook(_summed(axis))


def _entering(entry: Entry) -> Any:
    """Each token, and the weight of each of its experts, goes to work that the ranks share."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(_has_gradient(x) for x in (*args, *kwargs.values())):
            return None
        return tuple(map(marked, args)), {key: marked(value) for key, value in kwargs.items()}

    def marked(x: Any) -> Any:
        return entry.take(x) if _has_gradient(x) else x

    return hook


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _scaling(entry: Entry) -> Any:
    """The gate[N, 1] of the MLP beside the experts, the same on every rank, scales each one's part of its output."""
    return lambda _, args, gate: entry.take(gate)


def _summed(axis: Axis) -> Any:
    return lambda _, args, out: collectives.reduce(out, axis, "mlp.leave")
