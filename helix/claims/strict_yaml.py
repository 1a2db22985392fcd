"""YAML in which a key that is there twice is a fault: the plain reader takes the last one in silence."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from helix.config.schema import ConfigError


class _Strict(yaml.SafeLoader):
    """Also keeps anchors, which a ledger names its runs by."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for (node_of, _), key in zip(node.value, keys, strict=True):
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key has to be a text", node_of.start_mark)
    twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: Path) -> Any:
    """The content of a file.

    Raises:
        ConfigError: if it is no YAML, or a mapping in it has a key twice.
    """
    try:
        return yaml.load(path.read_text(), _Strict)
    except RecursionError:
        raise ConfigError(f"{path} is no YAML that can be read: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # !!int x, !!bool x, a date
        raise ConfigError(f"{path} is no YAML: {error}") from error
