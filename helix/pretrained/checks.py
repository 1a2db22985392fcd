"""What `helixify` refuses, before it touches a weight, and what a partitioned model refuses when it is called."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from helix.comm import transport
from helix.comm.mesh import Axis, Mesh
from helix.partition import phases
from helix.partition.architectures import Family
from helix.partition.families import PretrainedShape, describe
from helix.partition.grid import PartitionError
from helix.partition.phases import Phases
from helix.pretrained.generating import generator_state
from helix.pretrained.structure import (
    experts_of,
    family_of,
    feedforward_of,
    has,
    is_partitioned,
    layers_of,
    sizes,
)


def check(model: PreTrainedModel, mesh: Mesh, schedule: str | Phases) -> None:
    """Check that a model can be partitioned on a mesh.

    Raises:
        PartitionError: in one sentence, with what can be.
    """
    if not isinstance(model, PreTrainedModel):
        raise PartitionError(
            f"helixify takes transformers' own models, not a {type(model).__name__}; "
            "unwrap it, and merge adapters, first"
        )
    if is_partitioned(model):
        raise PartitionError(f"this {type(model).__name__} is partitioned already; load it whole to do it otherwise")
    shape = describe(model.config.to_dict())
    shape.check(mesh.grid)
    phases.check(Phases.of(schedule), mesh.grid.m, shape.kv_heads // mesh.grid.n)
    if mesh.stage.size > 1:
        raise PartitionError(f"helixify makes no pipeline; it takes a mesh of stage=1, not {mesh.stage.size}")
    if getattr(model.config, "output_attentions", False):
        raise PartitionError("no rank has whole attention weights; set output_attentions=False in the configuration")
    _check_tensors(model, mesh)
    _check_modules(model, shape)


def _check_tensors(model: PreTrainedModel, mesh: Mesh) -> None:
    name = type(model).__name__
    tensors = list(model.parameters())
    if any(isinstance(each, DTensor) for each in tensors):
        raise PartitionError(f"the weights of this {name} are cut already, by another library; load them whole")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise PartitionError(f"this {name} was loaded with a device_map, which moves its weights; load it without")
    devices = sorted({each.device.type for each in tensors})
    if devices not in (["meta"], [mesh.device_type]):
        raise PartitionError(
            f"the weights of this {name} are on {' and '.join(devices)}; they must all be on {mesh.device_type}, "
            "as the mesh is, or all on meta"
        )
    dtypes = sorted({str(each.dtype).removeprefix("torch.") for each in tensors if each.ndim > 1})
    if len(dtypes) > 1 or not all(each.is_floating_point() for each in tensors):
        raise PartitionError(f"the weights of this {name} are {' and '.join(dtypes)}; they must have one float dtype")


def _check_modules(model: PreTrainedModel, shape: PretrainedShape) -> None:
    family = family_of(model)
    for path in (family.layers, *family.embeddings):
        if not has(model, path):
            raise PartitionError(f"this {type(model).__name__} has no {path}, as {shape.family} models have")
    for path in family.heads:
        _check_linear(model.get_submodule(path), path)
    rows = {"separate": (shape.heads, shape.kv_heads, shape.kv_heads)}.get(
        family.attention.heads, (shape.heads + 2 * shape.kv_heads,)
    )
    for number, layer in enumerate(layers_of(model, family)):
        where = f"{family.layers}.{number}"
        for path in _linears(layer, family):
            if not has(layer, path):
                raise PartitionError(f"{where} has no {path}, as the layers of {shape.family} models have")
            _check_linear(layer.get_submodule(path), f"{where}.{path}")
        for path, heads in zip(family.attention.columns, rows, strict=True):
            found, _ = sizes(layer.get_submodule(path))
            if found != heads * shape.head_dim:
                raise PartitionError(
                    f"{where}.{path} makes {found} features, and the configuration's {heads} heads of "
                    f"{shape.head_dim} are {heads * shape.head_dim}; Helix needs the same heads in every layer"
                )
        _check_others(layer, where, family, shape.width)


def _linears(layer: nn.Module, family: Family) -> Iterator[str]:
    yield from (*family.attention.columns, family.attention.row)
    if (mlp := feedforward_of(layer, family)) is not None:
        yield from (*mlp.columns, mlp.row)


def _check_linear(linear: nn.Module, path: str) -> None:
    if type(linear) not in (nn.Linear, Conv1D):
        raise PartitionError(
            f"{path} is a {type(linear).__name__}, which Helix does not cut; merge adapters and undo quantization "
            "to plain linear layers first"
        )


def _check_others(layer: nn.Module, where: str, family: Family, width: int) -> None:
    """Refuse what else a layer learned, such as an adapter or a sink, which the partition would leave out of step."""
    known = {*_linears(layer, family), *family.attention.norms}
    if (experts := experts_of(layer, family)) is not None:
        known |= {experts.module, experts.router, *filter(None, [experts.shared_gate])}
    for name, parameter in layer.named_parameters():
        if name.rpartition(".")[0] not in known and parameter.shape != (width,):
            raise PartitionError(
                f"{where}.{name} is no part of the layers of {type(layer).__name__} that Helix knows; "
                "remove or merge what was added to the model"
            )


# What would go on with the rank's part as if it were the whole, and what to do instead.
_UNFIT = {
    "save_pretrained": "write it with helix.pretrained.saving.save(model, folder)",
    "push_to_hub": "write it with helix.pretrained.saving.save(model, folder), and push that",
    "resize_token_embeddings": "resize the whole model, then call helixify",
    "set_attn_implementation": "its attention is Helix's own",
    "__deepcopy__": "copy the whole model, and call helixify for both",
}


def forbid(model: nn.Module) -> None:
    """Have a partitioned model refuse those of its methods that only a whole model can run."""
    for name, instead in _UNFIT.items():
        setattr(model, name, _Refusal(f"a partitioned model does not run {name}: {instead}"))


class _Refusal:
    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise PartitionError(self.sentence)


class Calls:
    """Watches the calls of a partitioned model, as a hook before its forward.

    Args:
        axis: of all ranks that share the model.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis, self.in_step = axis, axis.size == 1

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what a partitioned model cannot answer exactly.

        Raises:
            PartitionError: for attention weights, or training with dropout by ranks that draw different numbers.
        """
        if kwargs.get("output_attentions"):
            raise PartitionError("no rank has whole attention weights; call the model without output_attentions")
        if model.training and not self.in_step and _draws(model):
            self._check_in_step(next(model.parameters()).device)

    def _check_in_step(self, device: torch.device) -> None:
        """Once, before the first training step: what all ranks hold alike, each drops out for itself."""
        own = torch.tensor([zlib.crc32(generator_state(device).numpy().tobytes())], device=device)
        if transport.all_gather(own, self.axis, "seed").unique().numel() > 1:
            raise PartitionError(
                "dropout needs the same random numbers on every rank; call torch.manual_seed with the same seed on "
                "each before training, or set dropout to 0 in the configuration"
            )
        self.in_step = True


def _draws(model: nn.Module) -> bool:
    """Whether a training step draws random numbers."""
    for module in model.modules():
        found = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if found or getattr(module, "jitter_noise", 0.0):
            return True
    return False
