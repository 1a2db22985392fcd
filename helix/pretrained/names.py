"""What a model's tensors are called in its files: transformers renames, stacks and adds prefixes as it loads.

Its own table (`conversion_mapping`) and functions say what becomes of each name, so that a folder of the hub with
Mixtral's one tensor an expert, with BERT's `gamma` and `beta` or without `model.` in front loads here as it does
there. Of the conversions of contents, the one that Helix's families need is done in slices: experts stacked to one
tensor. Any other is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from helix.checkpoint.content import CheckpointError

# Buffers that older versions of transformers stored, and newer ones compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")


@dataclass(frozen=True)
class Source:
    """Where one of a model's tensors is in the files.

    Args:
        keys: keys[e][p], the p-th tensor of expert e, one under the other along its dim 0; or ((key,),).
        stacked: whether dim 0 of the model's tensor is the experts, which the files' tensors lack.
    """

    keys: tuple[tuple[str, ...], ...]
    stacked: bool


def sources(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, Source], list[str]]:
    """Each of a model's tensors that is among the files' keys, by the model's names; and the keys of none.

    Args:
        model: whole; its tensors may be on the meta device.

    Raises:
        CheckpointError: if a tensor would have to be converted in a way that Helix does not know.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    found: dict[str, Source] = {}
    collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unknown = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            unknown.append(key)
        elif pattern is None:
            found[name] = Source(((key,),), stacked=False)
        else:
            collected[name][pattern].append(key)
    for name, parts in collected.items():
        first = next(iter(parts))
        converter = next(each for each in converters if first in each.source_patterns)
        found[name] = _stacked(name, converter, parts)
    return found, unknown


def _stacked(name: str, converter: WeightConverter, parts: dict[str, list[str]]) -> Source:
    operations = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        words = ", ".join(kind.__name__ for kind, _ in operations)
        raise CheckpointError(f"{name} is stored in a form that Helix does not convert ({words})")
    lists = [parts.get(pattern, []) for pattern in converter.source_patterns]
    if len({len(each) for each in lists}) != 1:
        counts = " and ".join(f"{len(parts.get(pattern, []))} of {pattern}" for pattern in converter.source_patterns)
        raise CheckpointError(f"{name} needs as many tensors of each kind, and the folder has {counts}")
    return Source(tuple(zip(*lists, strict=True)), stacked=True)


def misplaced(model: PreTrainedModel, unknown: list[str]) -> list[str]:
    """Those of a folder's unknown keys that belong to a module of the model, which would go without them.

    The others are of heads and poolers that this class of model does not have, or of buffers that it computes.
    """
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED]
    prefix = model.base_model_prefix
    modules = {name.removeprefix(f"{prefix}."): each for name, each in model.named_modules() if name}
    lists = tuple(f"{name}." for name, each in modules.items() if isinstance(each, nn.ModuleList))
    out = []
    for key in unknown:
        short = key.removeprefix(f"{prefix}.")
        inside = short.startswith(lists) or short.rpartition(".")[0] in modules
        if inside and not any(re.search(pattern, key) for pattern in ignored):
            out.append(key)
    return out
