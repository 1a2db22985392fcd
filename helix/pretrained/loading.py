"""Loading a partitioned model from a folder of safetensors: each rank reads its own parts and no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helix.comm.mesh import Mesh
from helix.pretrained.cuts import Cut
from helix.pretrained.helixify import cuts, family_of, partition


def load(folder: Path | str, mesh: Mesh, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model of a folder as transformers writes it, partitioned.

    Args:
        folder: with config.json and safetensors files.
        dtype: of the weights in memory.

    Raises:
        PartitionError: if the family is not known, or the grid does not divide its heads.
        FileNotFoundError: if the folder lacks the files, naming one.
    """
    folder = Path(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.tie_weights()
    own = cuts(model, mesh.grid, mesh.model.rank)
    files = _files(folder)
    shared = _tied(model)
    parts, wholes = {}, {}
    for name, part in _read(folder, files, own, shared, [name for name, _ in model.named_parameters()], dtype):
        (parts if name in own else wholes)[name] = part
    for name, first in shared.items():
        if first in parts and name in own:
            parts[name] = parts[first]
    for name, whole in wholes.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, nn.Parameter(whole))
    return partition(model, mesh, family_of(model), parts).eval()


def _files(folder: Path) -> dict[str, str]:
    """Which file has each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return files
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of tensors that are another's, and that one's."""
    first: dict[int, str] = {}
    out = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            out[name] = first[id(parameter)]
    return out


def _read(
    folder: Path,
    files: dict[str, str],
    own: dict[str, Cut],
    shared: dict[str, str],
    names: list[str],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(set(files.values())):
        with safe_open(folder / path, framework="pt") as file:
            for name in names:
                if files.get(name) != path:
                    continue
                cut = own.get(name)
                if cut is None:
                    yield name, file.get_tensor(name).to(dtype)
                    continue
                whole = file.get_slice(name)
                before = (slice(None),) * cut.dim
                yield name, cut.join([whole[(*before, slice(*run))].to(dtype) for run in cut.runs])
