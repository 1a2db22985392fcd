"""What the ranks generated, against what transformers alone does in one process with the same folder and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.generation.answers import Answer
from helix.generation.contenders import Source, all_cores, whole_model
from helix.generation.listening import Listener
from helix.generation.passes import Task
from helix.generation.sampling import chosen
from helix.study.accuracy import relative_error
from helix.study.report import Accuracy

REFERENCE = "transformers_single"


@dataclass(frozen=True)
class Expected:
    """One process' answers: the tokens of each prompt, and logits[B, V] after the first batch's prompts."""

    tokens: list[list[int]]
    logits: Tensor


@torch.inference_mode()
def expected(task: Task, source: Source) -> Expected:
    """Generate everything with transformers' plain model in this process, while the other ranks wait."""
    with all_cores():
        model = whole_model(source)
        options = chosen(task.generate, model, frozenset(), task.pad, 1)
        options.output_logits = True
        batch = task.prompts.tensors(task.prompts.batches[0], task.pad, task.device)
        logits = model.generate(**batch, generation_config=options).logits[0].float().cpu()  # type: ignore[operator]
        tokens = []
        for which in task.prompts.batches:
            batch = task.prompts.tensors(which, task.pad, task.device)
            answers = [Answer(task.tokenizer, task.prompts.ids[i], task.ends, task.stop) for i in which]
            torch.manual_seed(task.seed + which.start)
            options = chosen(task.generate, model, task.ends, task.pad)
            model.generate(**batch, generation_config=options, stopping_criteria=[Listener(answers)])  # type: ignore[operator]
            tokens += [one.tokens for one in answers]
    return Expected(tokens, logits)


def compare(tokens: Sequence[Sequence[int]], logits: Tensor, reference: Expected) -> Accuracy:
    """A method's answers against one process'."""
    differing = [index for index, own in enumerate(tokens) if list(own) != reference.tokens[index]]
    first = None
    if differing:
        pairs = zip(tokens[differing[0]], reference.tokens[differing[0]], strict=False)
        shorter = min(len(tokens[differing[0]]), len(reference.tokens[differing[0]]))
        first = next((at for at, (own, other) in enumerate(pairs) if own != other), shorter)
    return Accuracy(
        REFERENCE,
        relative_error(logits, reference.logits),
        tokens_equal=not differing,
        differing_prompts=tuple(index + 1 for index in differing),
        first_difference=None if first is None else first + 1,
    )
