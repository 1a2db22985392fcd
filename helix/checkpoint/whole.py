"""A module's parameters and its optimizers' state as whole tensors with names that no grid changes.

Most parameters are that already: a DTensor is whole by definition. Two kinds are not, and have a view here:

- Experts. A rank holds expert g as its k-th module, under a name that says k: with 8 experts, `ep_size=4` and a
  rank's index r of 4, k = 0 is g = 2 r. Here all are `..experts.up[experts@expert, F, E]`: rank r's modules, one
  after the other, are its shard of dim 0, for every ep_size. DeepSpeed's path to the router is left out too.
- `PlainTransformer`'s linear layers, which spell no head dims out: attention.q.weight[H * D, E] is
  attention.wq[H, P, D/P, E], so that what any grid saved runs on one device without Helix, and back.

An optimizer's state has the names `optimizer/{key}/{parameter}`, as `optimizer/exp_avg/head.weight`. State of the
parameter's shape is cut as the parameter is; a single value, such as AdamW's `step`, is on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from helix.checkpoint.content import CheckpointError
from helix.checkpoint.trained import Trained
from helix.models.experts import Expert, Experts
from helix.models.plain import PlainAttention, PlainExperts, PlainMLP, PlainTransformer
from helix.models.reference import Reference
from helix.models.transformer import Transformer
from helix.partition.function import function_of

STATE = "optimizer/"
# Torch's and its wrappers' own parts of a parameter's name.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Whole:
    """One whole tensor and what this process holds of it.

    Args:
        name: the same on every grid.
        parts: the parameters or buffers that this process holds it in: one, or its experts in order.
        shape: of the whole.
        view: from a tensor of a part's form to one of the whole's, sharing memory; None for experts, which are
            put together.
    """

    name: str
    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] | None

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors that are cut as the parts are (the parts, or their optimizer state), as one. Moves nothing."""
        if self.view is not None:
            return self.view(tensors[0].detach())
        first = tensors[0]
        if not isinstance(first, DTensor):
            return torch.stack([tensor.detach() for tensor in tensors])
        stride = torch.empty(self.shape, device="meta").stride()
        local = torch.cat([_local(tensor) for tensor in tensors])
        return DTensor.from_local(
            local, first.device_mesh, first.placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )

    def scatter(self, gathered: Tensor, tensors: Sequence[Tensor]) -> None:
        """Undo `gather`, into `tensors`; with a view they share memory, and nothing is left to do."""
        if self.view is not None:
            return
        for tensor, shard in zip(tensors, _local(gathered).chunk(len(tensors)), strict=True):
            _local(tensor).copy_(shard.view_as(_local(tensor)))


def wholes(module: nn.Module) -> dict[str, Whole]:
    """A module's parameters and persistent buffers by their names on every grid; a tied parameter once."""
    found: dict[str, Whole] = {}
    taken: set[int] = set()
    for prefix, child in module.named_modules():
        if isinstance(child, FSDPModule):
            child.reshard()  # after a validation its parameters may be the gathered ones, not the optimizer's
        special: Iterator[Whole] = iter(())
        if isinstance(child, Experts):
            special = _experts(child, _clean(prefix))
        elif isinstance(child, PlainTransformer):
            special = _plain(child, _clean(prefix))
        elif isinstance(child, Reference):
            special = _reference(child, _clean(prefix))
        for each in special:
            found[each.name] = each
            taken.update(map(id, each.parts))
    for name, tensor in [*module.named_parameters(), *_buffers(module)]:
        if id(tensor) not in taken:
            clean = _clean(name)
            assert clean not in found
            found[clean] = Whole(clean, (tensor,), tuple(tensor.shape), _same)
    return found


def trained_in(module: nn.Module) -> dict[str, Trained]:
    """The transformers that a module has, or is, by name. A `Reference` computes what it is told to, so it is none."""
    found = {}
    for prefix, child in module.named_modules():
        if isinstance(child, Transformer):
            found[_clean(prefix)] = Trained(child.shape, function_of(child.options, child.mesh.grid))
        elif isinstance(child, PlainTransformer):
            found[_clean(prefix)] = Trained(child.shape)
    return found


def elsewhere(module: nn.Module) -> tuple[str, ...]:
    """How the names begin of what other stages of a module's pipeline have; none if it has no stages."""
    found = []
    for prefix, child in module.named_modules():
        if isinstance(child, PlainTransformer):
            names = [name for name in ("embedding", "norm", "head") if getattr(child, name) is None]
            names += [f"blocks.{i}" for i in range(child.shape.layers) if str(i) not in child.blocks]
            found += [f"{_join(_clean(prefix), name)}." for name in names]
    return tuple(found)


def state_tensors(wholes: dict[str, Whole], optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by name.

    Raises:
        CheckpointError: naming state that is neither of its parameter's shape nor a single value.
    """
    tensors: dict[str, Tensor] = {}
    for whole in _of(wholes, optimizer):
        states = [optimizer.state.get(part, {}) for part in whole.parts]
        for key in dict.fromkeys(key for state in states for key in state):
            values = [state.get(key) for state in states]
            if any(value is not None for value in values):
                tensors[f"{STATE}{key}/{whole.name}"] = _state_tensor(whole, key, values)
    return tensors


def _state_tensor(whole: Whole, key: str, values: list[Any]) -> Tensor:
    if all(isinstance(value, Tensor) for value in values):
        if all(value.shape == part.shape for value, part in zip(values, whole.parts, strict=True)):
            return whole.gather(values)
        if all(value.ndim == 0 and bool(value == values[0]) for value in values):
            single: Tensor = values[0].detach()
            return single
    raise CheckpointError(
        f"the optimizer's {key} of {whole.name} cannot be saved for any grid: it is neither of the parameter's shape "
        "nor a single number"
    )


def groups(wholes: dict[str, Whole], optimizer: Optimizer) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: their options, and their parameters by name."""
    out = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        options = {key: value.item() if isinstance(value, Tensor) else value for key, value in options.items()}
        out.append({"options": options, "params": names(wholes, group["params"])})
    return out


def names(wholes: dict[str, Whole], parameters: Sequence[Tensor]) -> list[str]:
    """The names of parameters, in order and each once.

    Raises:
        CheckpointError: if one is no parameter of the module.
    """
    of = {id(part): name for name, whole in wholes.items() for part in whole.parts}
    if any(id(parameter) not in of for parameter in parameters):
        raise CheckpointError("the optimizer has parameters that the module does not have, so they have no name")
    return list(dict.fromkeys(of[id(parameter)] for parameter in parameters))


def _of(wholes: dict[str, Whole], optimizer: Optimizer) -> Iterator[Whole]:
    for group in optimizer.param_groups:
        for name in names(wholes, group["params"]):
            yield wholes[name]


def _experts(module: Experts, prefix: str) -> Iterator[Whole]:
    prefix = prefix.removesuffix(".experts")  # the methods that are not Helix's wrap them once more
    router = module.router_weight
    yield Whole(_join(prefix, "router"), (router,), tuple(router.shape), _same)
    own = [expert for expert in module.moe.deepspeed_moe.experts.deepspeed_experts if isinstance(expert, Expert)]
    assert own
    for key in ("up", "down"):
        parts = tuple(getattr(expert, key) for expert in own)
        yield Whole(_join(prefix, f"experts.{key}"), parts, (router.shape[0], *parts[0].shape[1:]), None)


def _plain(module: PlainTransformer, prefix: str) -> Iterator[Whole]:
    shape = module.shape
    parts, run = shape.layout.parts, shape.head_dim // shape.layout.parts
    heads, kv_heads = (shape.heads, parts, run), (shape.kv_heads, parts, run)
    spelt = {"q": (*heads, -1), "k": (*kv_heads, -1), "v": (*kv_heads, -1), "o": (-1, *heads)}
    for path, child in module.named_modules():
        if isinstance(child, PlainAttention):
            for layer, weight in child.named_parameters():
                name = layer.removesuffix(".weight")
                dims = spelt.get(name, (parts, run))  # else a norm's
                key = f"w{name}" if name in spelt else name
                yield _viewed(_join(prefix, f"{path}.{key}"), weight, dims)
        elif isinstance(child, PlainExperts):
            yield _layer(_join(prefix, f"{path}.router"), child.router)
            own = [expert for expert in child.experts if isinstance(expert, PlainMLP)]
            for key in ("up", "down"):
                weights = tuple(getattr(expert, key).weight for expert in own)
                yield Whole(_join(prefix, f"{path}.experts.{key}"), weights, (len(own), *weights[0].shape), None)
        elif isinstance(child, PlainMLP) and path.endswith("mlp"):  # else it is an expert
            yield _layer(_join(prefix, f"{path}.up"), child.up)
            yield _layer(_join(prefix, f"{path}.down"), child.down)


def _reference(module: Reference, prefix: str) -> Iterator[Whole]:
    experts: dict[str, list[Tensor]] = {}
    for name, weight in module.named_weights().items():
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(up|down)", name):
            experts.setdefault(f"{match[1]}.{match[2]}", []).append(weight)
        else:
            yield Whole(_join(prefix, name), (weight,), tuple(weight.shape), _same)
    for name, weights in experts.items():
        yield Whole(_join(prefix, name), tuple(weights), (len(weights), *weights[0].shape), None)


def _layer(name: str, layer: nn.Linear) -> Whole:
    return Whole(name, (layer.weight,), tuple(layer.weight.shape), _same)


def _viewed(name: str, weight: Tensor, dims: tuple[int, ...]) -> Whole:
    return Whole(name, (weight,), tuple(weight.detach().view(dims).shape), lambda tensor: tensor.view(dims))


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield _join(prefix, name), buffer


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
