"""A prompt and a model's files, checked before anything is launched. Knows no torch, so it takes no second."""

from __future__ import annotations

import json
import os
from pathlib import Path

from helix.checkpoint.asked import check_inference
from helix.checkpoint.content import CheckpointError
from helix.config.folder import folder_at, refuse_length
from helix.config.generation import check_shape, prompts_of
from helix.config.schema import PACKAGE, PRETRAINED, ConfigError, GenerateConfig, InferConfig
from helix.partition.families import PretrainedShape, describe
from helix.pretrained import smollm2
from helix.pretrained.folder import find, read_config

TOKENIZER = "tokenizer.json"
# Any of these makes a tokenizer that transformers can load.
_TOKENIZERS = (TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def check(settings: InferConfig) -> None:
    """Check a whole configuration of `infer.py`, and the model that it names.

    Raises:
        ConfigError, PartitionError: one sentence with the legal choices.
    """
    check_inference(settings)
    if settings.model.kind != PRETRAINED:
        return
    try:
        folder = folder_of(settings)
        shape = describe(read_config(folder) if settings.dry_run else find(folder).config)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    check_shape(settings.model, shape)
    if settings.prompt is None:  # of a dry run, which reads neither weights nor words
        return
    check_tokenizer(folder, prompts_of(settings), settings.generate, shape)


def folder_of(settings: InferConfig) -> Path:
    """The model's folder; SmolLM2's is made at the first call.

    Raises:
        CheckpointError: if it cannot be made.
    """
    return smollm2.folder() if settings.model.path == PACKAGE else folder_at(settings.model.path).resolve()


def check_tokenizer(folder: Path, prompts: list[str], generate: GenerateConfig, shape: PretrainedShape) -> None:
    """Check that there is a tokenizer, and that the prompts and what is to follow fit into the model's context.

    Raises:
        ConfigError: if not; a prompt is named.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ConfigError(
            f"model.path={folder} has no tokenizer ({TOKENIZER}); save it there with tokenizer.save_pretrained"
        )
    if generate.chat and not _has_template(folder):
        raise ConfigError(f"generate.chat=true needs a chat template, and {folder} has none; leave it out")
    if not (folder / TOKENIZER).is_file():
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises no other class
        raise ConfigError(f"{folder / TOKENIZER} cannot be read: {error}; save the tokenizer again") from None
    # A chat template adds a few, which only transformers knows; the ranks are not started before it was asked.
    lengths = [len(tokenizer.encode(prompt).ids) for prompt in prompts]
    refuse_length(lengths, generate.max_new_tokens, shape.context)


def _has_template(folder: Path) -> bool:
    if list(folder.glob("chat_template*")) or (folder / "additional_chat_templates").is_dir():
        return True
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False
