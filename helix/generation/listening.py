"""Hearing every token of transformers' `generate`, on each rank: the clock, the answers, where they stop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from helix.comm.record import Log
from helix.generation.answers import Answer
from helix.generation.views import View


class Listener(StoppingCriteria):
    """What `generate` calls with each new token; it ends an answer where a stop text is complete.

    Args:
        answers: of the batch, in its order.
        view: which shows them.
        log: of this rank's collectives, to be read at each token.

    Attributes:
        times: when each token was there, in seconds of the machine's monotonic clock.
        moved, calls: what the log had counted by then, by "collective/name": bytes, and collectives.
    """

    def __init__(self, answers: Sequence[Answer], view: View | None = None, log: Log | None = None) -> None:
        self.answers, self.view, self.log = answers, view, log
        self.times: list[float] = []
        self.moved: list[Counter[str]] = []
        self.calls: list[Counter[str]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        newest = input_ids[:, -1].tolist()  # on a GPU this waits for the token
        self.times.append(time.monotonic())
        if self.log is not None:
            self.moved.append(Counter(self.log.bytes))
            self.calls.append(Counter(self.log.calls))
        for answer, token in zip(self.answers, newest, strict=True):
            answer.put(token)
        if self.view is not None:
            self.view.show(self.answers)
        return torch.tensor([answer.finished for answer in self.answers], device=input_ids.device)
