"""What the ranks generated, against what transformers alone does in one process with the same folder and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from helix.generation.answers import Answer
from helix.generation.contenders import Source, all_cores, whole_model
from helix.generation.listening import Listener
from helix.generation.passes import RECORDED, Steps, Task
from helix.generation.sampling import chosen
from helix.study.accuracy import relative_error
from helix.study.report import Accuracy

REFERENCE = "transformers_single"


@dataclass(frozen=True)
class Expected:
    """One process' answers: the tokens of each prompt, and the first steps of the first batch."""

    tokens: list[list[int]]
    steps: Steps


@torch.inference_mode()
def expected(task: Task, source: Source) -> Expected:
    """Generate everything with transformers' plain model in this process, while the other ranks wait."""
    with all_cores():
        model = whole_model(source)
        most = min(task.generate.max_new_tokens, RECORDED)
        options = chosen(task.generate, model, frozenset(), task.pad, most)
        options.output_logits = True
        batch = task.prompts.tensors(task.prompts.batches[0], task.pad, task.device)
        torch.manual_seed(task.seed)
        steps = Steps.of(model.generate(**batch, generation_config=options))  # type: ignore[operator]
        tokens = []
        for which in task.prompts.batches:
            batch = task.prompts.tensors(which, task.pad, task.device)
            answers = [Answer(task.tokenizer, task.prompts.ids[i], task.ends, task.stop) for i in which]
            torch.manual_seed(task.seed + which.start)
            options = chosen(task.generate, model, task.ends, task.pad)
            model.generate(**batch, generation_config=options, stopping_criteria=[Listener(answers)])  # type: ignore[operator]
            tokens += [one.tokens for one in answers]
    return Expected(tokens, steps)


def compare(tokens: Sequence[Sequence[int]], steps: Steps, reference: Expected) -> Accuracy:
    """A method's answers against one process', and its first steps against those."""
    differing = [index for index, own in enumerate(tokens) if list(own) != reference.tokens[index]]
    first = None
    if differing:
        pairs = zip(tokens[differing[0]], reference.tokens[differing[0]], strict=False)
        shorter = min(len(tokens[differing[0]]), len(reference.tokens[differing[0]]))
        first = next((at for at, (own, other) in enumerate(pairs) if own != other), shorter)
    return Accuracy(
        REFERENCE,
        largest_error(steps, reference.steps),
        tokens_equal=not differing,
        differing_prompts=tuple(index + 1 for index in differing),
        first_difference=None if first is None else first + 1,
    )


def largest_error(own: Steps, reference: Steps) -> float:
    """The largest relative error of the logits of a step; an answer counts as long as it was given the same tokens."""
    errors = []
    for step, (logits, expected_logits) in enumerate(zip(own.logits, reference.logits, strict=True)):
        same = (own.tokens[:, :step] == reference.tokens[:, :step]).all(dim=1)
        if same.any():
            errors.append(relative_error(logits[same], expected_logits[same]))
    return max(errors)
