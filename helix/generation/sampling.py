"""What `generate` is told: how tokens are chosen, and where answers end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from helix.config.schema import ConfigError, GenerateConfig

# A token that no model has. Without any, the folder's own would end an answer.
_NEVER = 2**31 - 1


def of_folder(folder: Path) -> GenerationConfig | None:
    """What a model's folder says of generation.

    Raises:
        ConfigError: if it is no legal configuration.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be used: {reason}; correct it, or remove it") from None


def ends_of(model_config: Any, generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by the folder's own word."""
    for source in (generation_config, model_config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()


def ending_texts(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """The tokens of stop texts that are special tokens, which are never in an answer's text."""
    special = {each.content: number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
    return frozenset(special[text] for text in stop if text in special)


def padding(tokenizer: Any, ends: frozenset[int]) -> int:
    """The token that fills up short prompts, and answers that have ended; the mask hides it."""
    own = getattr(tokenizer, "pad_token_id", None)
    return int(own) if own is not None else min(ends, default=0)


def chosen(
    generate: GenerateConfig, model: PreTrainedModel, ends: frozenset[int], pad: int, limit: int | None = None
) -> GenerationConfig:
    """The configuration of one call. What it leaves open, such as a penalty, stays as the model's folder says.

    Args:
        limit: of new tokens, if not the configured one.
    """
    # Off has a value of its own in transformers; without it the folder's would count.
    drawing: dict[str, Any] = {"do_sample": False}
    if generate.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": generate.temperature,
            "top_k": generate.top_k or 0,
            "top_p": 1.0 if generate.top_p is None else generate.top_p,
        }
    return GenerationConfig(
        max_new_tokens=limit or generate.max_new_tokens,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        cache_implementation="dynamic",  # a cache that grows is the one that can be cut; a folder may ask for others
        return_dict_in_generate=True,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or [_NEVER],
        bos_token_id=getattr(model.generation_config, "bos_token_id", None),
        **drawing,
    )
