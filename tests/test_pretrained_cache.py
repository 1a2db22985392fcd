"""The dealt cache held against transformers' own, without ranks."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from helix.comm.mesh import Axis
from helix.partition.phases import Phases, Stride, Window, stride_of
from helix.pretrained.attention import attend
from helix.pretrained.cache import DealtLayer
from helix.pretrained.sharing import Place
from helix.pretrained.store import SPARE_TOKENS


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_each_token_belongs_to_one_rank(m: int, start: int, length: int) -> None:
    held = [[p for p in range(start, start + length) if p % m == rank] for rank in range(m)]
    for rank, own in enumerate(held):
        stride = stride_of("kvseq", m, rank)
        assert stride.count(start, start + length) == len(own)
        assert stride.before(start) == len([p for p in range(start) if p % m == rank])
        if own:
            assert start + stride.first(start) == own[0]
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert stride_of("batch", m, 0) == stride_of("heads", m, m - 1) == Stride(1, 0)


@given(st.one_of(st.none(), st.integers(1, 12)), st.integers(0, 30))
def test_a_window_starts_where_the_next_query_sees_first(size: int | None, length: int) -> None:
    seen = [p for p in range(length + 1) if size is None or p > length - size]
    assert Window(size).start(length) == seen[0]


class Together:
    """The caches of all ranks of an m-group in one process, and transformers' own beside them."""

    def __init__(self, m: int, decode: str, window: int | None, records: bool, batch: int, heads: int) -> None:
        self.m, self.decode = m, decode
        self.whole = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
        phases = Phases(decode=decode)
        self.ranks = [DealtLayer(Place(Axis("slice", m, rank, None), phases), window) for rank in range(m)]
        if records:
            for layer in (self.whole, *self.ranks):
                if hasattr(layer, "activate_past_recording"):
                    layer.activate_past_recording()
        self.shape, self.number = (batch, heads), 0

    def append(self, count: int) -> None:
        """Tokens that can be told apart, their heads and samples too."""
        batch, heads = self.shape
        numbers = torch.arange(self.number, self.number + batch * heads * count * 2, dtype=torch.float32)
        new = numbers.view(batch, heads, count, 2)
        self.number += numbers.numel()
        sizes = self.whole.get_mask_sizes(count)
        first = self.ranks[0].get_seq_length() == 0
        keys, _ = self.whole.update(new, -new)
        assert keys.shape[2] == sizes[0]
        parts = []
        for layer in self.ranks:
            assert layer.get_mask_sizes(count) == sizes
            own_keys, own_values = layer.update(new, -new)
            assert torch.equal(own_keys, -own_values)
            held = layer.place.held
            if first:
                assert held is None
                assert torch.equal(own_keys, keys)
            else:
                assert held is not None
                assert held.keys is own_keys
                assert torch.arange(sizes[0])[held.columns].numel() == own_keys.shape[2]
                parts.append((own_keys, held.columns))
        if parts:
            assert torch.equal(self._joined(parts, keys), keys)
        self.check()

    def check(self) -> None:
        """What all ranks hold together is what transformers holds, and none has more than its share."""
        lengths = {layer.get_seq_length() for layer in self.ranks}
        assert lengths == {self.whole.get_seq_length()}
        if not self.whole.get_seq_length():
            return
        kept = [layer.keys for layer in self.ranks]
        whole = self.whole.keys
        assert whole is not None
        assert sum(keys.numel() for keys in kept) == whole.numel()
        counts = [keys.shape[2] for keys in kept]
        assert max(counts) - min(counts) <= 1
        assert torch.equal(torch.cat([keys.flatten() for keys in kept]).sort().values, whole.flatten().sort().values)

    def _joined(self, parts: list[tuple[Tensor, slice]], whole: Tensor) -> Tensor:
        if self.decode != "kvseq":
            return torch.cat([keys for keys, _ in parts], 0 if self.decode == "batch" else 1)
        out = torch.full_like(whole, torch.nan)
        for keys, columns in parts:
            out[:, :, columns] = keys
        return out

    def each(self, method: str, argument: int | Tensor) -> None:
        for layer in (self.whole, *self.ranks):
            getattr(layer, method)(argument)
        self.check()


@st.composite
def histories(draw: st.DrawFn) -> tuple[Together, list[tuple[str, int]]]:
    m = draw(st.integers(1, 5))
    window = draw(st.one_of(st.none(), st.integers(2, 9)))  # of 1, transformers drops nothing
    decode = draw(st.sampled_from(["kvseq", "batch", "heads"]))
    group = Together(m, decode, window, draw(st.booleans()), m * draw(st.integers(1, 2)), m * draw(st.integers(1, 2)))
    steps = st.one_of(
        st.tuples(st.just("append"), st.one_of(st.just(1), st.integers(1, 12))),
        st.tuples(st.just("crop"), st.integers(0, 7)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("reverse"), st.just(0)),
        st.tuples(st.just("copy"), st.just(0)),
    )
    return group, draw(st.lists(steps, min_size=1, max_size=14))


@settings(deadline=None, max_examples=150)
@given(histories())
def test_all_ranks_together_hold_what_transformers_holds(history: tuple[Together, list[tuple[str, int]]]) -> None:
    """Appending, cropping, reordering, repeating and copying in any order, on any m, with any window."""
    group, steps = history
    since = 0  # tokens since the last crop
    for name, argument in steps:
        length = group.whole.get_seq_length()
        if name == "append":
            group.append(argument)
            since += argument
        elif name == "crop" and length > argument:
            # Of more than it has kept, transformers' sliding layer makes a shorter window without a word.
            window = group.whole.sliding_window if isinstance(group.whole, DynamicSlidingWindowLayer) else math.inf
            if length < window or (group.whole.record_past and argument <= since):
                group.each("crop", -argument)
                since = 0
        elif name == "repeat" and length and group.shape[0] < 20:
            group.each("batch_repeat_interleave", argument)
            group.shape = (group.shape[0] * argument, group.shape[1])
        elif name == "reverse" and length:
            # Within each rank's samples: what crosses ranks takes ranks.
            size = group.shape[0] // group.m
            order = torch.arange(group.shape[0]).view(group.m, size).flip(1).flatten()
            group.each("reorder_cache", order)
        elif name == "copy":
            group.ranks = [copy.deepcopy(layer) for layer in group.ranks]


def test_what_a_layer_has_dropped_cannot_be_cropped_back_to() -> None:
    layer = DealtLayer(Place(Axis("slice", 2, 0, None)), window=4)
    layer.update(torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 2))
    layer.crop(0)
    with pytest.raises(RuntimeError, match=r"no longer has the tokens before 6 .* activate_past_recording"):
        layer.crop(-1)
    assert layer.get_seq_length() == 9
    with pytest.raises(ValueError, match="as a negative one, not 3"):
        layer.crop(3)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.keys is None


@pytest.mark.parametrize("window", [None, 10])
def test_room_grows_by_so_many_tokens_at_a_time(window: int | None) -> None:
    """So that a step copies what came before once in so many steps, and what is reserved and not held is known."""
    layer = DealtLayer(Place(Axis("slice", 2, 1, None)), window)
    token, rooms = torch.zeros(1, 3, 1, 8), []
    for _ in range(400):
        layer.update(token, token)
        rooms.append(layer.reserved_bytes)
        assert layer.held_bytes == layer.keys.nbytes + layer.values.nbytes
        assert layer.reserved_bytes <= layer.held_bytes + 2 * (SPARE_TOKENS + 2) * token.nbytes
    assert layer.held_bytes == 2 * (200 if window is None else 5) * token.nbytes
    growths = sum(before != after for before, after in itertools.pairwise(rooms))
    assert growths <= 200 // SPARE_TOKENS + 1


def test_attention_refuses_other_keys_than_the_cache_handed_out() -> None:
    layer, token = DealtLayer(Place(Axis("slice", 1, 0, None))), torch.ones(1, 1, 1, 2)
    module = nn.Module()
    module.helix = layer.place
    layer.update(token, token)
    keys, values = layer.update(token, token)
    with pytest.raises(ValueError, match=r"^attention got other keys than the partitioned cache handed out; "):
        attend(module, token, keys.clone(), values, None)
    out, _ = attend(module, token, token, token, None)  # of its own, with no cache
    assert out.equal(token)


def test_room_of_inference_mode_is_not_written_outside_of_it() -> None:
    layer, token = DealtLayer(Place(Axis("slice", 1, 0, None))), torch.ones(1, 1, 1, 2)
    with torch.inference_mode():
        layer.update(token.clone(), token.clone())
        layer.update(token.clone(), token.clone())
    layer.update(2 * token, 2 * token)
    assert layer.keys[0, 0, :, 0].tolist() == [1, 1, 2]
