"""`generate` of a partitioned model: refused where the ranks would not all choose the same tokens."""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, MaxTimeCriteria, PreTrainedModel

from helix.comm.mesh import Axis
from helix.comm.shared_memory import slots_for
from helix.partition.grid import PartitionError

# The first arguments of `generate`, which may come without their names.
_POSITIONAL = ("inputs", "generation_config", "logits_processor", "stopping_criteria")


def watch(model: PreTrainedModel, axis: Axis) -> None:
    """Have a model's own `generate` check first that all ranks do the same.

    Each rank chooses the tokens for itself, from the same logits. One that were to choose others would go on with
    another text, and once it ends before the others do, they would wait for it forever.

    Args:
        axis: of all ranks that share the model.
    """
    if axis.size == 1 or not model.can_generate():
        return
    own, kind = weakref.ref(model), _kind(model)  # the model goes when nobody else has it

    @functools.wraps(kind.generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        """transformers' own.

        Raises:
            PartitionError: for max_time, for another prompt on another rank, or for sampling by ranks that would
                draw different numbers.
        """
        model = own()
        assert model is not None
        _check(model, axis, args, kwargs)
        return kind.generate(model, *args, **kwargs)

    model.generate = generate  # type: ignore[assignment]


def _kind(model: PreTrainedModel) -> Any:
    """Its class, of which not every PreTrainedModel's has a `generate`."""
    return type(model)


def _check(model: PreTrainedModel, axis: Axis, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
    criteria = given.get("stopping_criteria") or ()
    if _asked(model, given, "max_time") is not None or any(isinstance(each, MaxTimeCriteria) for each in criteria):
        raise PartitionError(
            "a partitioned model does not stop by max_time, as each rank has its own clock; give max_new_tokens"
        )
    inputs = _fingerprint({name: value for name, value in given.items() if isinstance(value, Tensor)})
    draws = _fingerprint({"": generator_state(model.device)}) if _asked(model, given, "do_sample") else 0
    everyones = _gathered(torch.tensor([inputs, draws], device=model.device), axis)
    if any(each != inputs for each, _ in everyones):
        raise PartitionError("generate got other inputs on another rank; give every rank of the mesh the same prompt")
    if any(each != draws for _, each in everyones):
        raise PartitionError(
            "sampling needs the same random numbers on every rank; call torch.manual_seed with the same seed on each "
            "before generate, or set do_sample=False"
        )


def _gathered(mine: Tensor, axis: Axis) -> list[list[int]]:
    """mine[X] of every rank. Unlike `transport.all_gather` it is not counted, as it belongs to no token."""
    if slots := slots_for(mine, axis):
        found: list[list[int]] = slots.exchange(mine).tolist()
        return found
    everyones = [torch.empty_like(mine) for _ in range(axis.size)]
    dist.all_gather(everyones, mine, group=axis.group)
    return [each.tolist() for each in everyones]


def _asked(model: Any, given: Mapping[str, Any], name: str) -> Any:
    """An option of generation, from where transformers takes it first."""
    configs = [given.get("generation_config"), model.generation_config]
    values = [given.get(name), *(getattr(each, name, None) for each in configs if isinstance(each, GenerationConfig))]
    return next((value for value in values if value is not None), None)


def _fingerprint(tensors: Mapping[str, Tensor]) -> int:
    """Of names, shapes and ids; of numbers that were computed, no more than the shapes: devices may round."""
    found = 0
    for name, each in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {[*each.shape]}".encode(), found)
        if not each.is_floating_point():
            found = zlib.crc32(each.detach().cpu().contiguous().numpy().tobytes(), found)
    return found


def generator_state(device: torch.device) -> Tensor:
    """bytes[S] of the random number generator that a model on this device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
