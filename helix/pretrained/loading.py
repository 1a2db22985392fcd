"""Loading a partitioned model from a Hugging Face folder: each rank reads its own parts, and no rank the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from helix.checkpoint.agree import sentence, together
from helix.checkpoint.content import CheckpointError
from helix.comm.mesh import Mesh
from helix.partition.families import describe
from helix.partition.phases import Phases
from helix.pretrained.checks import check
from helix.pretrained.cuts import Cut, cuts
from helix.pretrained.folder import ONLY_DATA, Folder, find, read_config
from helix.pretrained.helixify import partition
from helix.pretrained.names import Source, misplaced, sources
from helix.pretrained.reading import BYTES, Reader

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(
    folder: Path | str, mesh: Mesh, dtype: torch.dtype = torch.float32, schedule: str | Phases = "auto"
) -> PreTrainedModel:
    """A folder's model, partitioned over the m * n ranks of a mesh, in eval mode.

    Each rank of the mesh calls it, and reads from the folder, which need not be shared between hosts.

    Args:
        folder: as transformers writes it, and the hub has it: config.json and safetensors in one file or several.
        dtype: of the weights in memory, whatever the files' is.
        schedule: see `helixify`.

    Raises:
        PartitionError: if the model's family is not known, or the grid or the schedule does not fit it.
        CheckpointError: if the folder is not whole, or its tensors are not those that its config.json calls for.
    """
    check_dtype(dtype)
    describe(together(lambda: read_config(folder))).check(mesh.grid)
    found, model = together(lambda: (find(folder), empty(folder, dtype)))
    check(model, mesh, schedule)
    own = cuts(model, mesh.grid, mesh.model.rank)
    tensors = together(lambda: _read(found, model, own, dtype, mesh.device_type))
    _settle(model, {name: each for name, each in tensors.items() if name not in own}, mesh.device_type)
    parts = {name: tensors[name] for name in own}
    return partition(model, mesh, parts, schedule).eval()


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        names = ", ".join(str(each).removeprefix("torch.") for each in FLOATS)
        raise CheckpointError(f"weights are held in {names}, not in {str(dtype).removeprefix('torch.')}")


def empty(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A folder's model without weights: they are on the meta device, as the configuration makes them.

    What it imports, ranks that are forked later need not import again.

    Raises:
        PartitionError, CheckpointError: as `load`.
    """
    stated = read_config(folder)
    shape = describe(stated)
    kind = AutoModelForCausalLM if shape.causal else _encoder_kind(stated)
    try:
        config = AutoConfig.from_pretrained(folder, **ONLY_DATA)
        # Buffers are computed, as rotary embeddings' frequencies. Random weights on no device take a second.
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = kind.from_config(config, dtype=dtype, trust_remote_code=False)
        model.tie_weights()  # each module's tensor was moved to the meta device by itself
        if shape.causal and (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a configuration can be wrong in every way, and transformers notices anywhere
        raise CheckpointError(
            f"transformers makes no model of {folder}: {' '.join(sentence(error).split())}"
        ) from error
    model.name_or_path = str(folder)
    return model


def _encoder_kind(stated: dict[str, Any]) -> type[AutoModel | AutoModelForMaskedLM]:
    """With the head that predicts masked words, or, if config.json says so, without any."""
    first, *_ = stated.get("architectures") or [None]
    return AutoModel if first in MODEL_MAPPING_NAMES.values() else AutoModelForMaskedLM


def _read(
    folder: Folder, model: PreTrainedModel, own: dict[str, Cut], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """A rank's part of each tensor, by the model's names; tied ones that are cut alike are one tensor."""
    found = _checked(folder, model)
    reader, state = Reader(folder), model.state_dict()
    out: dict[str, Tensor] = {}
    for names in ties(model):
        first, *others = [name for name in names if name in found]
        for cut, alike in _alike(names, own):
            part = reader.read(found[first], state[first].shape, cut, dtype)
            for other in others:
                if not torch.equal(part, reader.read(found[other], state[other].shape, cut, dtype)):
                    raise CheckpointError(
                        f"{folder.path} ties {other} to {first}, and its files have different ones; "
                        "say tie_word_embeddings: false in config.json if both are meant"
                    )
            part = part.to(device)
            out |= dict.fromkeys(alike, part)
    return out


def _alike(names: list[str], own: dict[str, Cut]) -> Iterator[tuple[Cut | None, list[str]]]:
    """Tied names by the cut that they share."""
    for cut in {own.get(name) for name in names}:
        yield cut, [name for name in names if own.get(name) == cut]


def ties(model: PreTrainedModel) -> list[list[str]]:
    """The names of a whole model's tensors, those of one tensor together: first the name that is saved."""
    groups = {name: [name] for name in model.state_dict() if name not in model.all_tied_weights_keys}
    for other, name in model.all_tied_weights_keys.items():
        groups[name].append(other)
    return list(groups.values())


def _checked(folder: Folder, model: PreTrainedModel) -> dict[str, Source]:
    """Where each of the model's tensors is in the folder.

    Raises:
        CheckpointError: if one is missing or of another shape, or there are some that the model should have.
    """
    found, unknown = sources(model, folder.tensors)
    missing = [names[0] for names in ties(model) if not any(name in found for name in names)]
    if missing:
        raise CheckpointError(f"{folder.path} lacks {_some(missing)}, which its config.json calls for")
    if strange := misplaced(model, unknown):
        raise CheckpointError(f"{folder.path} has {_some(strange)}, for which its config.json has no place")
    for name, whole in model.state_dict().items():
        if name in found:
            _check_stored(folder, name, found[name], tuple(whole.shape))
    return found


def _check_stored(folder: Folder, name: str, source: Source, shape: tuple[int, ...]) -> None:
    stored = [[folder.tensors[key] for key in keys] for keys in source.keys]
    for each in (each for row in stored for each in row):
        if each.dtype not in BYTES:
            raise CheckpointError(
                f"{folder.path / each.file} has {name} as {each.dtype}; Helix loads weights of {', '.join(BYTES)}, "
                "none that are quantized"
            )
    if not source.stacked:
        ((one,),) = stored
        has = one.shape
    else:
        rows = [(sum(each.shape[0] for each in row), *row[0].shape[1:]) for row in stored]
        has = (len(rows), *rows[0]) if len({each.shape for row in stored for each in row}) == 1 else ()
    if has != shape:
        raise CheckpointError(f"{folder.path} has {name} as {list(has)}, and its config.json makes it {list(shape)}")


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _settle(model: PreTrainedModel, wholes: dict[str, Tensor], device: str) -> None:
    """Put what is not cut into its place, and all that the model computed itself onto the device."""
    for name, whole in wholes.items():
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        if key in module._buffers:
            module._buffers[key] = whole
        else:
            setattr(module, key, nn.Parameter(whole))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
