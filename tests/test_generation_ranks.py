"""Ranks that must agree: on tokens, and on what failed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from texts import tokenizer

from helix.config.schema import GenerateConfig
from helix.generation.answers import Answer
from helix.generation.contenders import Contender
from helix.generation.errors import Diverged
from helix.generation.listening import Listener
from helix.generation.measure import Found, _warm_up
from helix.generation.passes import Heard, Task, check_agreement
from helix.generation.tokens import Prompts
from helix.study.trial import Refused


def an_answer(*tokens: int) -> Answer:
    answer = Answer(tokenizer(), [5], frozenset())
    for token in tokens:
        answer.put(token)
    return answer


def test_ranks_that_chose_other_tokens_are_named() -> None:
    class Model(Contender):
        def __init__(self, here: bool) -> None:
            super().__init__()
            self.model = torch.nn.Linear(1, 1) if here else None  # type: ignore[assignment]

    def rank() -> str:
        import torch.distributed as dist

        own = dist.get_rank()
        heard = Heard(0.0, (1.0,), [an_answer(8, 9)], 0)
        check_agreement([heard], Model(here=True))
        other = replace(heard, answers=[an_answer(8, 7 if own == 2 else 9)])
        check_agreement([other], Model(here=own != 2))  # which has no part of it
        try:
            check_agreement([other], Model(here=True))
        except Diverged as error:
            return str(error)
        return ""

    assert {each.partition(" chose")[0] for each in on_ranks(3, rank)} == {"rank 2"}


def test_what_fails_on_one_rank_is_refused_by_all_and_they_go_on_together() -> None:
    """In the second of three batches, on the only rank that has a model."""

    class Failing:
        generation_config = None
        calls = 0

        def generate(self, stopping_criteria: list[Listener], **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise ValueError("no more")
            stopping_criteria[0](torch.tensor([[5]]), None)
            return SimpleNamespace(past_key_values=None)

    def rank() -> tuple[str, int]:
        import torch.distributed as dist

        each = Contender.__new__(Contender)
        each.model = Failing() if dist.get_rank() == 0 else None  # type: ignore[assignment]
        prompts = Prompts(("a", "b", "c"), ((5,), (6,), (7,)), 1)
        task = Task(prompts, GenerateConfig(), tokenizer(), frozenset(), 0, (), 0, torch.device("cpu"))
        with pytest.raises(Refused) as refused:
            _warm_up(task, each, Found("here", 0, 0), None)
        count = torch.ones(1)
        dist.all_reduce(count)
        return str(refused.value), int(count)

    assert on_ranks(2, rank) == [("ValueError: no more", 2)] * 2
