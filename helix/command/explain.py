"""Hydra's and OmegaConf's errors as one sentence with the legal choices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra.conf import HydraConf
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from helix.command.prompt import LISTED
from helix.config.check import suggest
from helix.config.schema import ConfigError, PartitionError
from helix.config.words import kinds

# What a list looks like.
_LISTS = {"generate.stop": "\"['END']\"", "baseline": "[hf_tp2]"}
FORM = "write key=value, such as parallel.m=4 or model=moe"


def explain(error: Exception, schema: type, conf: Path, overrides: list[str]) -> str:
    """What is wrong with a command line that could not be composed.

    Args:
        error: what Hydra raised.
        schema: dataclass of the command's configuration.
        conf: folder of its configs.
        overrides: the command line's.
    """
    if isinstance(error, RecursionError):
        return "a config of the command line is nested too deeply, or leads to itself; write it flat"
    if said := next((each for each in _chain(error) if isinstance(each, (ConfigError, PartitionError))), None):
        return str(said)  # of a resolver
    for cause in _chain(error):
        if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark:
            mark = cause.problem_mark
            return f"{mark.name} is no legal YAML at line {mark.line + 1}: {cause.problem}"
        if isinstance(cause, OverrideParseException):
            form = LISTED if str(cause.override).startswith("prompt=") else FORM
            return f"cannot read {cause.override!r}{_reason(cause)}; {form}"
        if isinstance(cause, MissingConfigException):
            return _missing_option(cause, conf)
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            key = cause.full_key or str(cause.key)
            return _others_experiment(key, overrides) or unknown_key(key, schema)
        if isinstance(cause, ValidationError) and cause.full_key:
            return _wrong_type(cause, schema)
        if isinstance(cause, MissingMandatoryValue) and cause.full_key:
            return missing_value(cause.full_key, schema, conf)
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if "deletion" in str(cause):
                return f"{cause.full_key} cannot be removed; write {cause.full_key}= with a value"
            return f"{cause.full_key}: {_first_line(cause)}"
    return _by_text(error, schema, conf, overrides)


def unknown_key(key: str, schema: type) -> str:
    """A key that the schema does not have: the nearest that it has, and those beside it."""
    parent = key.rpartition(".")[0]
    beside = _names(_node(schema, parent))
    prefix = f"{parent}." if parent else ""
    near = suggest(key, [prefix + name for name in beside]) or suggest(key, list(_keys(schema)))
    legal = f"; keys of {parent or 'the command'}: {', '.join(beside)}" if beside else ""
    return f"there is no key {key}{near}{legal}"


def missing_value(key: str, schema: type, conf: Path) -> str:
    """A key without a value: a group without an option, or a size that only the user can choose."""
    if options := group_options(conf, key):
        return f"{key} is not given; choose one of: {_assignments(key, options)}"
    return f"{key} is not given; write {key}= with {_legal_types(key, schema) or 'a value'}"


def group_options(conf: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__  # Hydra drops the cause of an error inside a config file


def _node(schema: type, path: str) -> Any:
    """The dataclass that a dotted key leads to, or None."""
    node: Any = schema
    for name in filter(None, path.split(".")):
        if name == "hydra" and node is schema:
            node = HydraConf
        else:
            node = get_type_hints(node).get(name) if is_dataclass(node) else None
    return node


def _names(node: Any) -> list[str]:
    return [field.name for field in fields(node)] if is_dataclass(node) else []


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name in _names(schema):
        yield prefix + name
        yield from _keys(_node(schema, name), f"{prefix}{name}.")


def _reason(error: OverrideParseException) -> str:
    """What Hydra's grammar says, if it is about a value rather than the parser's own states."""
    known = re.search(r"(Unknown function '\w+')", error.message)
    return f": {known.group(1)[0].lower()}{known.group(1)[1:]}" if known else ""


def _others_experiment(key: str, overrides: list[str]) -> str | None:
    """What to say of a key that nobody but an experiment of another command has set."""
    asked = next((one for one in overrides if one.startswith("experiment=")), None)
    if asked is None or any(one.lstrip("+~").startswith(key) for one in overrides):
        return None
    return (
        f"{asked} sets {key}, which this command does not have; conf/experiment/train/ is train.py's, the rest of "
        "conf/experiment/ infer.py's"
    )


def _others_model(key: str, overrides: list[str]) -> str | None:
    """What to say of a group that only a model of another command chooses an option of."""
    asked = next((one for one in overrides if one.startswith("model=")), None)
    if asked is None or any(one.lstrip("+~").startswith(key) for one in overrides):
        return None
    return f"{asked} is a pretrained model, with which infer.py generates text; this command takes model=tiny"


def _missing_option(error: MissingConfigException, conf: Path) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"there is no config {option!r}; choose one of: {', '.join(group_options(conf, '.'))}"
    options = list(error.options or group_options(conf, group))
    if group.split("/")[0] == "experiment":  # whose folders are no groups of their own
        group, option = "experiment", f"{group}/{option}".removeprefix("experiment/")
        files = (path.relative_to(conf / group) for path in (conf / group).rglob("*.yaml"))
        options = sorted(str(file.with_suffix("")) for file in files)
    grid = re.fullmatch(r"helix_(\d+)x(\d+)", option)
    if grid and group == "parallel":
        near = f" (any grid: parallel=helix parallel.m={grid.group(1)} parallel.n={grid.group(2)})"
    else:
        near = suggest(option, options)
    return f"there is no {group}={option}{near}; choose one of: {_assignments(group, options)}"


def _assignments(group: str, options: list[str]) -> str:
    return ", ".join(f"{group}={option}" for option in options)


def _wrong_type(error: ValidationError, schema: type) -> str:
    key = str(error.full_key)
    if get_origin(_node(schema, key)) is list:
        return f"{key} takes a list: {key}={_LISTS.get(key, '[a,b]')}"
    legal = _legal_types(key, schema)
    value = re.search(r"[Vv]alue '(.*?)' (?:of type|is not)", str(error), re.DOTALL)
    given = value.group(1) if value else "null" if "Optional" in str(error) else None
    if not legal or given is None:
        return f"{key}: {_first_line(error)}"
    return f"{key} takes {legal}, not {given}"


def _legal_types(key: str, schema: type) -> str:
    return kinds(_node(schema, key))


def _by_text(error: Exception, schema: type, conf: Path, overrides: list[str]) -> str:
    """Errors that Hydra tells apart by their text alone."""
    text = str(error)
    if isinstance(error, AttributeError) and (null := re.search(r"full_key: (\S+)", text)):
        return f"{null.group(1)} is null, and is given entries one at a time: +{null.group(1)}.NAME=value"
    if several := re.search(r"(?:value for argument|Sweep parameters) '(.*)'", text):
        key = several.group(1).partition("=")[0]
        return f"{several.group(1)} has several values: to run each of them add -m, to mean one write {key}='a,b'"
    if absent := re.search(r"(?:Could not delete from config\.|Could not override) '(.*)'", text):
        return _others_model(absent.group(1), overrides) or unknown_key(absent.group(1), schema)
    if "does not support sweep type" in text:
        return "a sweep takes listed values, such as parallel.m=1,2,4, or range(1,5), and no interval"
    if twice := re.search(r"An item is already at '(.*)'\.|Multiple values for (\w+)\.", text):
        key = twice.group(1) or twice.group(2)
        return f"+{key}= adds a key, and {key} is there already; write {key}= without the +"
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if not key:
            return f"cannot read {override!r}; {FORM}"
        if isinstance(error, ValueError | TypeError) and (options := group_options(conf, key)):
            return f"{override} names no option; choose one of: {_assignments(key, options)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
