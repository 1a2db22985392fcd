"""`helixify`: a Hugging Face model partitioned in place."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from helix.comm.mesh import Axis, Mesh
from helix.partition.architectures import Family, Feedforward, Projections
from helix.partition.phases import Phases
from helix.pretrained import cache
from helix.pretrained.attention import NAME
from helix.pretrained.checks import Calls, check, forbid
from helix.pretrained.cuts import cuts
from helix.pretrained.experts import cut_experts
from helix.pretrained.generating import watch
from helix.pretrained.layers import Columns, Entry, Gathered, HeadNorm, Heads, Projection, Rows
from helix.pretrained.sharing import Place
from helix.pretrained.structure import (
    experts_of,
    family_of,
    has,
    head_dim,
    is_transposed,
    layers_of,
    put,
    same_tensors,
    sizes,
)
from helix.pretrained.vocabulary import cut_embedding


def helixify(model: PreTrainedModel, mesh: Mesh, schedule: str | Phases = "auto") -> PreTrainedModel:
    """Partition a Hugging Face model over the m * n ranks of a mesh, in place, and return it.

    Every rank calls it with the same whole model, and keeps its part of every weight: of attention's projections its
    slice of the features of its head group, of the MLP, the experts, the embedding and the head one m * n-th. Only
    norms, biases of sums and routers stay whole. The model's own code goes on computing masks, rotary embeddings,
    norms of heads and windows, and `forward`, `generate` and `loss.backward()` give every rank what the whole model
    would give it. A parameter's gradient is that of the rank's part; of one that stays whole, it is complete. Make an
    optimizer afterwards, of the parts; for sampling, and for dropout in training, seed all ranks alike. Convert it to
    its dtype before.

    A model on the meta device gets parts on the meta device; `helix.pretrained.loading` reads them from a folder.

    Args:
        model: of one of the families that `helix.partition.families` lists, with or without its language head.
        mesh: of this rank, one pipeline stage.
        schedule: of prefill, or `Phases` of prefill and decoding; "auto" takes the cheapest.

    Raises:
        PartitionError: if Helix does not partition such a model, or the grid or the schedule does not fit it, in one
            sentence with what would. Nothing has been changed then.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from helix import Grid, Mesh, helixify, launch
    >>> def greet() -> list[int]:
    ...     torch.manual_seed(0)  # the same weights on every rank
    ...     model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
    ...         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
    ...     helixify(model, Mesh(Grid(m=2, n=2)))
    ...     return model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=5, do_sample=False)[0].tolist()
    >>> answers = launch(greet, ranks=4)
    >>> len(answers), len(answers[0]), all(answer == answers[0] for answer in answers)
    (4, 8, True)
    """
    check(model, mesh, schedule)
    own = cuts(model, mesh.grid, mesh.model.rank)
    first = dict(same_tensors(model))
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in own:
            known = first.get(name)
            parts[name] = parts[known] if known is not None else own[name].take(parameter.detach())
    return partition(model, mesh, parts, schedule)


def partition(
    model: PreTrainedModel, mesh: Mesh, parts: dict[str, Tensor], schedule: str | Phases = "auto"
) -> PreTrainedModel:
    """Put a rank's parts into the places of the whole weights; see `helixify`.

    Args:
        parts: by all names that `cuts` has; where two names have the same tensor, they get the same parameter.
    """
    family = family_of(model)
    own = _parameters(model, parts)
    dim, phases = head_dim(model), Phases.of(schedule)
    places: dict[int, Place] = {}
    for number, layer in enumerate(layers_of(model, family)):
        prefix = f"{family.layers}.{number}."
        inside = {name.removeprefix(prefix): part for name, part in own.items() if name.startswith(prefix)}
        heads = Heads(dim, mesh.slice, Entry(mesh.model, "attention"))
        places[number] = _cut_attention(layer, family.attention, heads, mesh, phases, inside)
        if (experts := experts_of(layer, family)) is not None:
            cut_experts(layer, experts, mesh.model, inside)
        else:
            _cut_mlp(layer, family.mlp, mesh.model, inside)
    _cut_ends(model, family, mesh.model, own)
    _take_config(model)
    model.register_forward_pre_hook(Calls(mesh.model), with_kwargs=True)
    cache.deal(model, places, mesh.grid)
    forbid(model)
    watch(model, mesh.model)
    model.helix = mesh  # type: ignore[assignment]  # no module, and not saved
    return model


def _parameters(model: PreTrainedModel, parts: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parts as parameters, trained if the whole was."""
    made: dict[int, nn.Parameter] = {}
    out = {}
    for name, whole in model.named_parameters(remove_duplicate=False):
        if name in parts:
            part = parts[name]
            out[name] = made.setdefault(id(part), nn.Parameter(part, requires_grad=whole.requires_grad))
    return out


def _cut_attention(
    layer: nn.Module, names: Projections, heads: Heads, mesh: Mesh, phases: Phases, parts: dict[str, nn.Parameter]
) -> Place:
    module: Any = layer.get_submodule(names.module)
    for path in names.columns:
        put(layer, path, Projection(*_linear(layer, path, parts), heads))
    put(layer, names.row, Rows(*_linear(layer, names.row, parts), mesh.model, "attention"))
    for path in names.norms:
        if has(layer, path):  # not all models of a family have them
            layer.get_submodule(path).register_forward_pre_hook(HeadNorm(mesh.model))
    if names.heads == "stacked":
        module.split_size //= mesh.grid.n
    module.helix = place = Place(mesh.slice, phases)
    return place


def _cut_mlp(layer: nn.Module, names: Feedforward, axis: Axis, parts: dict[str, nn.Parameter]) -> None:
    entry = Entry(axis, "mlp")
    for path in names.columns:
        put(layer, path, Columns(*_linear(layer, path, parts), entry))
    put(layer, names.row, Rows(*_linear(layer, names.row, parts), axis, "mlp"))


def _cut_ends(model: nn.Module, family: Family, axis: Axis, parts: dict[str, nn.Parameter]) -> None:
    for path, name in zip(family.embeddings, ("embedding", "positions"), strict=False):
        module = model.get_submodule(path)
        assert isinstance(module, nn.Embedding)
        cut_embedding(module, parts[f"{path}.weight"], axis, name)
    for path in family.heads:
        out, _ = sizes(model.get_submodule(path))
        name = "head" if path == family.heads[0] else path.rpartition(".")[2]
        put(model, path, Gathered(*_linear(model, path, parts), axis, name, out))
    for path, parameter in parts.items():  # a head's bias may have a second name in its parent
        parent, _, name = path.rpartition(".")
        if name in model.get_submodule(parent)._parameters:
            setattr(model.get_submodule(parent), name, parameter)


def _linear(
    root: nn.Module, path: str, parts: dict[str, nn.Parameter]
) -> tuple[nn.Parameter, nn.Parameter | None, bool]:
    """A linear layer's weight and bias on this rank, and whether it is transposed; a bias that is not cut is whole."""
    linear: Any = root.get_submodule(path)
    return parts[f"{path}.weight"], parts.get(f"{path}.bias", linear.bias), is_transposed(linear)


def _take_config(model: PreTrainedModel) -> None:
    """Choose the attention function in a configuration of the model's own: it may have shared it with another."""
    shared, own = model.config, copy.deepcopy(model.config)
    own._attn_implementation = NAME
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own  # type: ignore[assignment]
