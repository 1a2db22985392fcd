"""The key/value cache of a partitioned model, of which every rank of an m-group has its own part."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from helix.partition.families import describe
from helix.partition.grid import Grid
from helix.partition.phases import Phases, Stride, Window, check
from helix.pretrained.sharing import Held, Place, Sharing
from helix.pretrained.store import Store


class DealtLayer(DynamicLayer):
    """One layer's cache, in transformers' terms; a rank's part is chosen by `Place.decode` when the first tokens come.

    Args:
        place: of the layer's attention module.
        window: of a sliding layer; older tokens are dropped.

    Attributes:
        keys, values: this rank's part of [B, K@head, S, D], by tokens, samples or KV heads; None while empty.
        record_past: whether a sliding layer keeps what it could drop, until `crop`.
    """

    def __init__(self, place: Place, window: int | None = None) -> None:
        super().__init__()
        self.place, self.window = place, Window(window)
        self.is_sliding = window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._sharing: Sharing | None = None
        self._oldest = self._length = 0  # positions: of the oldest token that is held, and of the next to come

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep this rank's part of the new tokens.

        Returns:
            All keys and values if these are the first, which the prefill then cuts as it likes; else this rank's
            part of those that the new tokens can see, of which `Place.held` tells the attention function.
        """
        first, count, self.place.held = self._length, key_states.shape[2], None
        if self._sharing is None:
            return self._begin(key_states, value_states)
        sharing, store, seen = self._sharing, self._store, self.window.start(first)
        self._length += count
        store.append(sharing.keep(key_states, first), sharing.keep(value_states, first))
        stride = sharing.stride
        keys, values = store.last(stride.count(seen, self._length))
        self.place.held = Held(keys, sharing, slice(stride.first(seen), None, stride.step))
        if not self.record_past:
            self._forget()
        self._show()
        return keys, values

    def _begin(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._sharing = sharing = self.place.decode(keys)
        self._store = Store(sharing.keep(keys[:, :, :0], 0))
        self._length = keys.shape[2]
        self._oldest = 0 if self.record_past else self.window.start(self._length)  # of the prompt what will be seen
        kept = (sharing.keep(z[:, :, self._oldest :], self._oldest) for z in (keys, values))
        self._store.append(*kept)
        self.is_initialized = True
        self._show()
        return keys, values

    def _forget(self) -> None:
        """Drop what no later token will see."""
        start = self.window.start(self._length)
        self._store.drop(first=self._stride.count(self._oldest, start))
        self._oldest = start

    @property
    def _stride(self) -> Stride:
        return Stride() if self._sharing is None else self._sharing.stride

    def _show(self) -> None:
        self.keys, self.values = self._store.keys, self._store.values

    @property
    def reserved_bytes(self) -> int:
        """Bytes of memory for keys and values, with the room for tokens to come."""
        return 0 if self._sharing is None else self._store.reserved_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values that this rank holds."""
        return 0 if self._sharing is None else self._store.held_bytes

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next call's queries see together, and the position of the first."""
        start = self.window.start(self._length)
        return self._length + query_length - start, start

    def get_seq_length(self) -> int:
        """Tokens that came, on all ranks together."""
        return self._length

    def get_max_length(self) -> int:
        return -1 if self.window.size is None else self.window.size

    def activate_past_recording(self) -> None:
        """Have a sliding layer keep what it could drop, until `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number, and what a sliding layer kept for that.

        Raises:
            ValueError: for a positive number.
            RuntimeError: if a sliding layer has dropped what it would see then.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative one, not {tokens_to_remove}")
        if self._sharing is None:
            return
        length = max(self._length + tokens_to_remove, 0)
        if self.window.start(length) < self._oldest:
            raise RuntimeError(
                f"this sliding layer no longer has the tokens before {self._oldest} that it would see at {length}; "
                "call the cache's activate_past_recording() before it grows past its window"
            )
        self._store.drop(last=self._stride.count(length, self._length))
        self._length = length
        if length:
            self._forget()
            self._show()
        else:
            self._clear()  # the next batch may be of another size

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sample i becomes what sample beam_idx[i] was; by samples, ranks exchange those that change places."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples, in this order.

        Raises:
            ValueError: if the cache is shared by samples, and the m ranks cannot share so many.
        """
        if self._sharing is None:
            return
        sharing, samples = self._sharing, indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._store.change(lambda held: sharing.select(held, samples))
        self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample `repeats` times, one after the other."""
        if self._sharing is not None:
            self._store.change(lambda held: held.repeat_interleave(repeats, 0))  # each rank's samples stay its own
            self._show()

    def offload(self) -> None:
        raise ValueError("the cache of a partitioned model is not offloaded; use a DynamicCache without offloading")


def deal(model: PreTrainedModel, places: Mapping[int, Place], grid: Grid) -> None:
    """Have the caches that a partitioned model is called with, or makes, be shared by the ranks of its m-groups.

    A call that cannot run is refused before it computes anything: other caches than transformers' DynamicCache, one
    with another model's tokens in it, and a batch that the phases asked for cannot be cut by.

    Args:
        places: of its attention modules, by layer.
    """
    base = model.base_model
    names = list(inspect.signature(base.forward).parameters)
    first = next(iter(places.values()))
    shape = describe(model.config.to_dict())
    kv_heads = shape.kv_heads // grid.n

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for place in places.values():
            place.held = None  # of a call that did not come to its end
        given = dict(zip(names, args, strict=False)) | kwargs
        inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        cache = given.get("past_key_values")
        caches = shape.causal and (cache is not None or _caches(module, given))
        if isinstance(inputs, Tensor) and not _is_dealt(cache):
            asked = first.phases if caches else Phases(first.phases.prefill)
            check(asked, first.axis.size, kv_heads, inputs.shape[0])
        if cache is None and caches:
            kwargs, args = {**given, "past_key_values": _dealt(DynamicCache(config=module.config), places)}, ()
        elif cache is not None and not (_is_dealt(cache) and cache.layers[0].place is first):
            _dealt(cache, places)
        return args, kwargs

    base.register_forward_pre_hook(hook, with_kwargs=True)


def _caches(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether the model would make a cache by itself."""
    asked = given.get("use_cache")
    wanted = getattr(model.config, "use_cache", False) if asked is None else asked
    return bool(wanted) and not (model.training and getattr(model, "gradient_checkpointing", False))


def _is_dealt(cache: Any) -> bool:
    layers = getattr(cache, "layers", None)  # transformers has caches of caches too
    return isinstance(layers, list) and bool(layers) and isinstance(layers[0], DealtLayer)


def _dealt(cache: Any, places: Mapping[int, Place]) -> DynamicCache:
    """A new cache, its layers replaced by dealt ones.

    Raises:
        ValueError: if it is of another kind, or not new.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
        raise ValueError(f"a partitioned model keeps its keys in a DynamicCache without offloading, not in {kind}")
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            whose = "another partitioned model" if isinstance(layer, DealtLayer) else f"a {type(layer).__name__}"
            raise ValueError(f"a partitioned model needs a new DynamicCache; this one is of {whose}")
        if layer.get_seq_length():
            raise ValueError("a cache with another model's tokens in it cannot be dealt out; start from a new one")
    old: list[Any] = [*cache.layers] or [None] * len(places)
    new = []
    for place, layer in zip(places.values(), old, strict=True):
        new.append(DealtLayer(place, getattr(layer, "sliding_window", None)))
        new[-1].record_past = getattr(layer, "record_past", False)
    cache.layers = [*new]
    return cache
