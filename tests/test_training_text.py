"""What models read and are trained on: the machine's own text, its cut, and the order of its windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix.study.text import TrainingText, byte_batches, corpus, unigram_entropy


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


def test_corpus_is_this_machines_own_and_repeatable() -> None:
    text = corpus(limit_bytes=100_000)
    assert len(text) == 100_000
    assert text == corpus(limit_bytes=100_000)
    assert b"import" in text


def test_corpus_of_a_folder_and_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one ")
    assert corpus(str(tmp_path)) == b"one two"
    assert corpus(str(tmp_path / "a.txt")) == b"one "
    assert corpus(str(tmp_path), limit_bytes=6) == b"one tw"
    with pytest.raises(ValueError, match=r"there is no text at .*nothing"):
        corpus(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        corpus(str(tmp_path / "empty"))


def test_batches_are_windows_of_the_text() -> None:
    data = bytes(range(256))
    tokens = byte_batches(data, batch=3, length=5, count=2, seed=7)
    assert (tokens.shape, str(tokens.dtype)) == ((2, 3, 5), "int64")
    assert (tokens[..., 1:] - tokens[..., :-1] == 1).all()
    assert (tokens == byte_batches(data, 3, 5, 2, seed=7)).all()
    assert (tokens != byte_batches(data, 3, 5, 2, seed=8)).any()
    assert byte_batches(data, 1, 256, 1, seed=0).tolist() == [[list(data)]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((1, 257, 1), "256 bytes, too few for one sequence of 257"), ((0, 1, 1), "batch must be at least 1")],
)
def test_batches_refuse(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        byte_batches(bytes(range(256)), *sizes, seed=0)
