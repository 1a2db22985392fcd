"""`helixify`: a Hugging Face model partitioned in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.pytorch_utils import Conv1D

from helix.comm import collectives, transport
from helix.comm.mesh import Axis, Mesh
from helix.partition.grid import Grid, PartitionError
from helix.pretrained.attention import NAME, DealtLayer, Place
from helix.pretrained.cuts import Cut, head_rows, merged, share
from helix.pretrained.families import FAMILIES, Experts, Family, Feedforward, Projections
from helix.pretrained.layers import Columns, Heads, Projection, Rows


def cuts(model: PreTrainedModel, grid: Grid, rank: int) -> dict[str, Cut]:
    """What rank i * m + j holds of each parameter that is cut, by the model's names; the others it holds whole.

    Raises:
        PartitionError: if the family is not known, or the grid does not divide its heads.
    """
    family = family_of(model)
    heads = head_counts(model)
    grid.check(*heads)
    out: dict[str, Cut] = {}
    for number, layer in enumerate(model.get_submodule(family.layers)):
        own: dict[str, Cut] = {}
        own |= _attention_cuts(layer, family.attention, heads, grid, rank)
        for mlp in feedforwards(layer, family):
            for path in mlp.columns:
                linear = layer.get_submodule(path)
                own |= _linear_cut(linear, path, share(0, _sizes(linear)[0], grid, rank), bias=True)
            linear = layer.get_submodule(mlp.row)
            own |= _linear_cut(linear, mlp.row, share(1, _sizes(linear)[1], grid, rank), bias=False)
        if (experts := experts_of(layer, family)) is not None:
            own |= _expert_cuts(layer, experts, grid, rank)
        out |= {f"{family.layers}.{number}.{name}": cut for name, cut in own.items()}
    vocab = model.get_input_embeddings().weight.shape[0]
    out[f"{family.embedding}.weight"] = share(0, vocab, grid, rank)
    if family.head is not None and _has(model, family.head):
        out |= _linear_cut(model.get_submodule(family.head), family.head, share(0, vocab, grid, rank), bias=True)
    return out


def helixify(model: PreTrainedModel, mesh: Mesh) -> PreTrainedModel:
    """Partition a loaded model over the m * n ranks of a mesh, in place, and return it.

    Each rank calls it with the same whole model, and keeps its part of every weight.

    Raises:
        PartitionError: if the model's family is not known, or the grid does not divide its heads. Nothing has been
            changed then.
    """
    own = cuts(model, mesh.grid, mesh.model.rank)
    family = family_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts = {name: cut.take(parameters[name].detach()) for name, cut in own.items()}
    return partition(model, mesh, family, parts)


def partition(model: PreTrainedModel, mesh: Mesh, family: Family, parts: dict[str, Tensor]) -> PreTrainedModel:
    """Put this rank's parts, by the model's names, into the places of the whole weights."""
    _, _, head_dim = head_counts(model)
    places: dict[int, Place] = {}
    for number, layer in enumerate(model.get_submodule(family.layers)):
        own = {
            name.removeprefix(f"{family.layers}.{number}."): part
            for name, part in parts.items()
            if name.startswith(f"{family.layers}.{number}.")
        }
        places[number] = _cut_attention(layer, family.attention, head_dim, mesh, own)
        for mlp in feedforwards(layer, family):
            for path in mlp.columns:
                _put(layer, path, Columns(*_part(layer, path, own)))
            _put(layer, mlp.row, Rows(*_part(layer, mlp.row, own), mesh.model, "mlp"))
            _enter(layer.get_submodule(mlp.module), mesh.model, "mlp")
        if (experts := experts_of(layer, family)) is not None:
            _cut_experts(layer, experts, mesh.model, own)
    _cut_vocabulary(model, family, mesh.model, parts)
    _deal_cache(model, places)
    model.config._attn_implementation = NAME
    return model


def family_of(model: PreTrainedModel) -> Family:
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise PartitionError(f"helixify does not know {kind} models; it knows: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def head_counts(model: PreTrainedModel) -> tuple[int, int, int]:
    """Query heads, KV heads, and a head's features."""
    config = model.config
    heads: int = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def feedforwards(layer: nn.Module, family: Family) -> Iterator[Feedforward]:
    experts = experts_of(layer, family)
    if experts is None:
        yield family.mlp
    else:
        yield from experts.shared


def experts_of(layer: nn.Module, family: Family) -> Experts | None:
    return family.experts if family.experts is not None and _has(layer, family.experts.module) else None


def _attention_cuts(
    layer: nn.Module, names: Projections, heads: tuple[int, int, int], grid: Grid, rank: int
) -> dict[str, Cut]:
    count, kv_count, dim = heads
    out: dict[str, Cut] = {}
    for path, counts in zip(names.columns, _counts(names, count, kv_count), strict=True):
        linear = layer.get_submodule(path)
        if names.heads == "interleaved":  # three rows of features to a head
            runs = [
                run for head in range(count) for part in range(3) for run in _one(head, part, dim, count, grid, rank)
            ]
        else:
            firsts = [sum(counts[:index]) * dim for index in range(len(counts))]
            runs = [
                run
                for first, each in zip(firsts, counts, strict=True)
                for run in head_rows(first, each, dim, grid, rank)
            ]
        length = sum(stop - start for start, stop in runs)
        out |= _linear_cut(linear, path, Cut(0, merged(iter(runs)), length), bias=True)
    runs = list(head_rows(0, count, dim, grid, rank))
    cut = Cut(1, merged(iter(runs)), sum(stop - start for start, stop in runs))
    return out | _linear_cut(layer.get_submodule(names.row), names.row, cut, bias=False)


def _counts(names: Projections, heads: int, kv_heads: int) -> list[list[int]]:
    if names.heads == "separate":
        return [[heads], [kv_heads], [kv_heads]]
    return [[heads, kv_heads, kv_heads]]


def _one(head: int, part: int, dim: int, heads: int, grid: Grid, rank: int) -> Iterator[tuple[int, int]]:
    group, feature_slice = divmod(rank, grid.m)
    own, width = heads // grid.n, dim // grid.m
    if group * own <= head < (group + 1) * own:
        start = (head * 3 + part) * dim + feature_slice * width
        yield start, start + width


def _linear_cut(linear: nn.Module, path: str, cut: Cut, bias: bool) -> dict[str, Cut]:
    """A linear layer's cut, given as of a weight [out, in]."""
    dim = 1 - cut.dim if isinstance(linear, Conv1D) else cut.dim
    out = {f"{path}.weight": Cut(dim, cut.runs, cut.length)}
    if bias and linear.bias is not None:
        out[f"{path}.bias"] = Cut(0, cut.runs, cut.length)
    return out


def _expert_cuts(layer: nn.Module, names: Experts, grid: Grid, rank: int) -> dict[str, Cut]:
    module = layer.get_submodule(names.module)
    hidden = getattr(module, names.down).shape[2]
    down = share(2, hidden, grid, rank)
    (start, stop), each = down.runs[0], down.length
    if each * grid.ranks != hidden:
        raise PartitionError(f"m * n = {grid.ranks} ranks do not divide the experts' {hidden} hidden features")
    gate_up = Cut(1, ((start, stop), (hidden + start, hidden + stop)), 2 * each)
    return {f"{names.module}.{names.gate_up}": gate_up, f"{names.module}.{names.down}": down}


def _cut_attention(layer: nn.Module, names: Projections, head_dim: int, mesh: Mesh, parts: dict[str, Tensor]) -> Place:
    module = layer.get_submodule(names.module)
    heads = Heads(head_dim, mesh.slice)
    for path in names.columns:
        _put(layer, path, Projection(*_part(layer, path, parts), heads))
    _put(layer, names.row, Rows(*_part(layer, names.row, parts), mesh.model, "attention"))
    for path in names.norms:
        for parameter in layer.get_submodule(path).parameters():
            # It sees the rank's own heads, and the gradient of its own query rows.
            parameter.register_hook(lambda grad: transport.all_reduce(grad, mesh.model, "norm.grad"))
    place = Place(mesh.slice)
    module.helix = place
    if names.heads == "stacked":
        module.split_size //= mesh.grid.n
    _enter(module, mesh.model, "attention")
    return place


def _cut_experts(layer: nn.Module, names: Experts, axis: Axis, parts: dict[str, Tensor]) -> None:
    module = layer.get_submodule(names.module)
    for name in (names.gate_up, names.down):
        setattr(module, name, nn.Parameter(parts[f"{names.module}.{name}"]))
    _enter(module, axis, "experts")
    module.register_forward_hook(lambda _, args, out: collectives.reduce(out, axis, "experts.leave"))


def _cut_vocabulary(model: PreTrainedModel, family: Family, axis: Axis, parts: dict[str, Tensor]) -> None:
    embedding = model.get_submodule(family.embedding)
    vocab, tied = embedding.weight.shape[0], False
    head = model.get_submodule(family.head) if family.head is not None and _has(model, family.head) else None
    if head is not None:
        tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(parts[f"{family.embedding}.weight"])
    embedding.num_embeddings, embedding.padding_idx = embedding.weight.shape[0], None
    first = axis.rank * embedding.num_embeddings
    embedding.register_forward_pre_hook(_own_ids(embedding, first))
    embedding.register_forward_hook(_summed(embedding, axis))
    if head is not None and family.head is not None:
        columns = Columns(*_part(model, family.head, parts))
        if tied:
            columns.weight = embedding.weight
        _put(model, family.head, columns)
        _enter(columns, axis, "head")

        def whole(_: nn.Module, args: Any, logits: Tensor) -> Tensor:
            """logits[.., V@model] -> [.., V]."""
            if axis.size == 1:
                return logits
            gathered = collectives.gather(logits.unsqueeze(0), axis, "head.leave")
            return gathered.movedim(0, -2).flatten(-2)[..., :vocab]

        columns.register_forward_hook(whole)


def _own_ids(embedding: nn.Module, first: int) -> Callable[..., Any]:
    """ids -> the rank's own row of each, and row 0 for others' ids, whose output `_summed` leaves out."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        own = args[0] - first
        embedding.helix_own = (own >= 0) & (own < embedding.weight.shape[0])
        return torch.where(embedding.helix_own, own, 0)

    return hook


def _summed(embedding: nn.Module, axis: Axis) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return collectives.reduce(out * embedding.helix_own.unsqueeze(-1), axis, "embedding.leave")

    return hook


def _enter(module: nn.Module, axis: Axis, name: str) -> None:
    """Have every activation that enters a block be marked as replicated: its gradient is summed over the ranks."""

    def marked(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad:
            return collectives.replicate(x, axis, f"{name}.enter")
        return x

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(marked, args)), {key: marked(value) for key, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _deal_cache(model: PreTrainedModel, places: dict[int, Place]) -> None:
    """Have the cache that transformers makes, in `generate` or for a call without one, be dealt out."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache", getattr(model.config, "use_cache", False)):
            kwargs["past_key_values"] = cache = DynamicCache(config=model.config)
        if isinstance(cache, Cache):
            cache.layers = [_dealt(layer, places[number]) for number, layer in enumerate(cache.layers)] or [
                DealtLayer(place) for place in places.values()
            ]
        return args, kwargs

    model.register_forward_pre_hook(hook, with_kwargs=True)


def _dealt(layer: Any, place: Place) -> DealtLayer:
    if isinstance(layer, DealtLayer):
        return layer
    if layer.get_seq_length():
        raise ValueError("a cache with tokens in it cannot be dealt out; start from an empty one")
    return DealtLayer(place, getattr(layer, "sliding_window", None))


def _part(root: nn.Module, path: str, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, bool]:
    """A linear layer's weight and bias on this rank, and whether it is transposed; a bias that is not cut is whole."""
    linear = root.get_submodule(path)
    bias = parts.get(f"{path}.bias")
    if bias is None and linear.bias is not None:
        bias = linear.bias.detach().clone()
    return parts[f"{path}.weight"], bias, isinstance(linear, Conv1D)


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """(out, in)"""
    first, second = linear.weight.shape
    return (second, first) if isinstance(linear, Conv1D) else (first, second)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True
