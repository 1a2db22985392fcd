"""Prompts as tokens: the tokenizer, its chat template, batches of unequal lengths padded on the left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix.config.folder import refuse_length
from helix.config.generation import batch_sizes
from helix.config.schema import ConfigError
from helix.pretrained.folder import ONLY_DATA


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, a transformers `PreTrainedTokenizerBase`.

    Raises:
        ConfigError: if there is none that transformers can load.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **ONLY_DATA)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.path={folder} has no tokenizer that transformers can load: {reason}") from None


@dataclass(frozen=True)
class Prompts:
    """What is to be gone on from.

    Args:
        texts: as they were given.
        ids: of each, as the model reads it, a chat template's included.
        batch: how many are answered at once.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    batch: int

    @property
    def batches(self) -> list[range]:
        """Which prompts are answered together."""
        sizes = batch_sizes(len(self.texts), self.batch)
        return [range(sum(sizes[:index]), sum(sizes[: index + 1])) for index in range(len(sizes))]

    def tensors(self, which: range, pad: int, device: torch.device) -> dict[str, Tensor]:
        """input_ids[B, T] and attention_mask[B, T] of some of them, padded on the left."""
        rows = [self.ids[index] for index in which]
        longest = max(map(len, rows))
        ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }


def encode(tokenizer: Any, texts: Sequence[str], chat: bool, batch: int, new: int, context: int) -> Prompts:
    """Prompts as tokens.

    Args:
        chat: whether each is a user's message.
        new: how many tokens are to follow.
        context: positions of the model.

    Raises:
        ConfigError: if there is no chat template, or a prompt is too long.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("generate.chat=true needs a chat template, and the tokenizer has none; leave it out")
        messages = [[{"role": "user", "content": text}] for text in texts]
        whole = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in messages]
    else:
        whole = list(texts)
    ids = [tuple(tokenizer(text, add_special_tokens=not chat)["input_ids"]) for text in whole]
    for number, one in enumerate(ids):
        if not one:
            raise ConfigError(f"prompt {number + 1} of {len(ids)} has no tokens; give a text that the tokenizer knows")
    refuse_length([len(one) for one in ids], new, context)
    return Prompts(tuple(texts), tuple(ids), batch)
