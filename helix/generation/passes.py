"""One batch of prompts answered by one method, and what was heard of it on this rank."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix.comm.record import Span, record
from helix.config.schema import GenerateConfig
from helix.generation.answers import Answer
from helix.generation.contenders import Contender, cache_bytes
from helix.generation.errors import Diverged
from helix.generation.listening import Listener
from helix.generation.sampling import chosen
from helix.generation.tokens import Prompts
from helix.generation.views import View

# Tokens of a recorded answer: the prompt's, one of a decode step to warm up, and three of recorded ones.
RECORDED = 5


@dataclass(frozen=True)
class Task:
    """What is to be generated, the same on all ranks.

    Args:
        tokenizer: see `helix.generation.tokens.read_tokenizer`.
        ends: tokens that end an answer.
        pad: the token that fills up.
        stop: texts that end an answer, too.
        seed: of the tokens that are drawn.
        device: this rank's.
    """

    prompts: Prompts
    generate: GenerateConfig
    tokenizer: Any
    ends: frozenset[int]
    pad: int
    stop: tuple[str, ...]
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Heard:
    """One batch's answers on one rank; times are seconds of its machine's monotonic clock.

    Args:
        begin_s: when the prompts were handed over.
        token_s: when each token was there; empty on a rank that has no part of the model.
        answers: the batch's.
        cache_bytes: of this rank's cache at the end.
    """

    begin_s: float
    token_s: Sequence[float]
    answers: Sequence[Answer]
    cache_bytes: int


@dataclass(frozen=True)
class Moment:
    """One step of a recorded answer on one rank: the prompt, or one token after it."""

    start_s: float
    end_s: float
    spans: list[Span]
    moved: Counter[str]
    calls: Counter[str]


@dataclass(frozen=True)
class Steps:
    """What the first steps of one batch's answers came to: logits[S, B, V], and the tokens[B, S] chosen from them."""

    logits: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, out: Any) -> Steps:
        """From what `generate` returned, with its logits."""
        logits = torch.stack(out.logits).float().cpu()
        return cls(logits, out.sequences[:, -len(logits) :].cpu())


@dataclass(frozen=True)
class Recorded:
    """A few tokens' steps of one batch on one rank, the prompt's first."""

    moments: list[Moment]
    steps: Steps | None


@torch.inference_mode()
def answer(task: Task, contender: Contender, which: range, view: View | None = None) -> Heard:
    """Have one batch answered. All ranks call it."""
    answers = [Answer(task.tokenizer, task.prompts.ids[i], task.ends, task.stop) for i in which]
    if view is not None:
        view.begin([task.prompts.texts[index] for index in which])
    dist.barrier()
    listener = Listener(answers, view)
    begin, out = _generate(task, contender, which, listener, task.ends)
    if view is not None:
        view.end(answers)
    cached = 0 if out is None else cache_bytes(out.past_key_values)
    return Heard(begin, tuple(listener.times), answers, cached)


@torch.inference_mode()
def answer_recorded(task: Task, contender: Contender, which: range) -> Recorded:
    """A few tokens with every collective kept; no token ends them. All ranks call it."""
    answers = [Answer(task.tokenizer, task.prompts.ids[i], frozenset()) for i in which]
    dist.barrier()
    with record() as log, contender.observed():
        listener = Listener(answers, log=log)
        begin, out = _generate(task, contender, which, listener, frozenset(), RECORDED)
    moments, moved, calls, spans = [], Counter[str](), Counter[str](), log.spans
    for index, end in enumerate(listener.times):
        own = [span for span in spans if begin <= span.start_s < end]
        step = listener.moved[index] - moved, listener.calls[index] - calls
        moments.append(Moment(begin, end, own, *step))
        begin, moved, calls = end, listener.moved[index], listener.calls[index]
    return Recorded(moments, None if out is None else Steps.of(out))


def _generate(
    task: Task, contender: Contender, which: range, listener: Listener, ends: frozenset[int], limit: int | None = None
) -> tuple[float, Any]:
    """When it began, and what `generate` returned; None on a rank without a part of the model."""
    model = contender.model
    if model is None:
        return time.monotonic(), None
    # The same on all ranks, which then draw the same tokens; in each batch others, even for the same prompt.
    torch.manual_seed(task.seed + which.start)
    batch = task.prompts.tensors(which, task.pad, task.device)
    most = min(task.generate.max_new_tokens, limit or task.generate.max_new_tokens)
    options = chosen(task.generate, model, ends, task.pad, most)
    options.output_logits = limit is not None
    begin = time.monotonic()
    with contender.computing():
        out = model.generate(**batch, generation_config=options, stopping_criteria=[listener])  # type: ignore[operator]
    return begin, out


def check_agreement(heard: Sequence[Heard], contender: Contender) -> None:
    """Check that all ranks that have a part of the model chose the same tokens, each by itself.

    Raises:
        Diverged: on every rank.
    """
    own = None
    if contender.model is not None:
        tokens = repr([one.tokens for each in heard for one in each.answers])
        own = hashlib.sha256(tokens.encode()).hexdigest()
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    said = [each for each in found if each is not None]
    others = [rank for rank, each in enumerate(found) if each not in (None, said[0])]
    if others:
        raise Diverged(
            f"rank {', '.join(map(str, others))} chose other tokens than the ranks before; their devices or libraries "
            "compute differently, so that no answer can be trusted"
        )
