"""What a model is trained on: the cut of a text, and the order of its windows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helix.study.text import TrainingText, unigram_entropy


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2000, 200_000), batch=st.integers(1, 4), length=st.integers(1, 50), every=st.integers(2, 10),
    number=st.integers(0, 10**9),
)  # fmt: skip
def test_training_text_never_touches_what_is_held_out(
    size: int, batch: int, length: int, every: int, number: int
) -> None:
    # Each byte says whether its place is held out, once the text's own cut is known.
    text = TrainingText(bytes(size), batch, length, 0, every)
    marks = np.zeros(size, dtype=np.uint8)
    for begin, end in text._held_out:
        marks[begin:end] = 1
    assert 0 < marks.mean() <= 1 / every
    marked = TrainingText(marks.tobytes(), batch, length, 0, every)
    assert marked.batch(number).shape == (batch, length + 1)
    assert not marked.batch(number).any()
    validation = marked.validation(3)
    assert 1 <= len(validation) <= 3
    assert all(one.shape == (batch, length + 1) and one.all() for one in validation)


def test_the_order_is_a_function_of_seed_and_number() -> None:
    data = np.random.default_rng(0).integers(256, size=50_000, dtype=np.uint8).tobytes()
    whole = TrainingText(data, 8, 16, seed=3)
    assert (whole.batch(5) == TrainingText(data, 8, 16, seed=3).batch(5)).all()
    assert (whole.batch(5) != whole.batch(6)).any()
    assert (whole.batch(5) != TrainingText(data, 8, 16, seed=4).batch(5)).any()
    halves = TrainingText(data, 4, 16, seed=3)
    assert (np.concatenate([halves.batch(10), halves.batch(11)]) == whole.batch(5)).all()
    assert (np.concatenate([whole.batch(5, replica, 4) for replica in range(4)]) == whole.batch(5)).all()
    shares = [np.concatenate(whole.validation(3, replica, 2)) for replica in range(2)]
    assert sorted(map(bytes, np.concatenate(shares))) == sorted(map(bytes, np.concatenate(whole.validation(3))))


def test_unigram_entropy() -> None:
    assert unigram_entropy(b"aabb" * 5) == 1.0
    assert unigram_entropy(b"aaaa") == 0.0
    assert unigram_entropy(bytes(range(256))) == 8.0
