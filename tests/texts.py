"""A tiny random Hugging Face model with a tokenizer of bytes, in a folder as a user has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pretrained import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 260  # all bytes, and four tokens that are no text
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<end>{% endif %}"


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A token for each byte, after 0: <pad>, 1: <start>, 2: <end>, 3: <user>."""
    special = ["<pad>", "<start>", "<end>", "<user>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*special, *alphabet])}
    own = Tokenizer(models.BPE(vocab, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens(special)
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    made = PreTrainedTokenizerFast(tokenizer_object=own, **names)
    if chat:
        made.chat_template = TEMPLATE
    return made


def write_folder(folder: Path, family: str = "llama", chat: bool = False, **changes: Any) -> Path:
    """Random weights, so large that an answer depends on all that was said before; see `pretrained.config`."""
    model = tiny(family, vocab_size=VOCAB, **{"tie_word_embeddings": False} | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder
