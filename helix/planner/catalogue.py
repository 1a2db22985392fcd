"""Hardware and models by name, as conf/ has them."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import helix
from helix.config.folder import CONFIG, shape_of
from helix.config.schema import PACKAGE, PRETRAINED, ConfigError, HardwareConfig, ModelConfig, to_shape
from helix.config.values import check_values, suggest
from helix.config.words import kinds
from helix.partition.architectures import FAMILIES
from helix.partition.shape import TransformerShape
from helix.planner.answering import planned, without_pairs

CONF = Path(helix.__file__).resolve().parent.parent / "conf"


def hardware(name: str) -> HardwareConfig:
    """A file of conf/hardware, by its name, or any hardware file, by its path.

    Raises:
        ConfigError: if there is none, with those that there are; or if it is not as it should be.
    """
    return read(hardware_file(name))


def hardware_file(name: str) -> Path:
    """The file that a name or a path stands for.

    Raises:
        ConfigError: if there is none, with those that there are.
    """
    return Path(name).expanduser() if is_file(name) else check_named("hardware", name)


def is_file(name: str) -> bool:
    """Whether a name is the path of a YAML file."""
    path = Path(name).expanduser()
    return path.suffix in (".yaml", ".yml") and path.is_file()


def read(path: Path) -> HardwareConfig:
    """A hardware file.

    Raises:
        ConfigError: if it is not as it should be.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no legal YAML: it is not UTF-8") from error
    return parsed(text, str(path))


def parsed(text: str, path: str) -> HardwareConfig:
    """What a hardware file's text says.

    Raises:
        ConfigError: if it is not as it should be; `path` names it.
    """
    content, hints = _content(text, path), get_type_hints(HardwareConfig)
    for key, value in content.items():
        if key not in hints:
            raise ConfigError(f"{path} is no hardware file: no such has a key {key}{suggest(str(key), list(hints))}")
        try:
            OmegaConf.merge(OmegaConf.structured(HardwareConfig), {key: value})
        except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            legal = kinds(hints[key])
            wrong = f"takes {legal}, not {_short(value)}" if legal else "is not as python -m helix calibrate writes it"
            raise ConfigError(f"{path} is no hardware file: {key} {wrong}") from error
    try:
        merged = OmegaConf.merge(OmegaConf.structured(HardwareConfig), content)
        missing = sorted(OmegaConf.missing_keys(merged))
        found = None if missing else cast(HardwareConfig, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no hardware file: ${{..}} in it leads nowhere") from error
    if found is None:
        raise ConfigError(f"{path} is no hardware file: {missing[0]} is not given")
    check_values(found, "hardware.")
    return found


def _short(value: object) -> str:
    """A value as a sentence can hold it: a few aliases of YAML write a list of any length."""
    return str(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _content(text: str, path: str) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{path} is no legal YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # !!int x, !!bool x, a date
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path} is no legal YAML{f' at line {mark.line + 1}' if mark else ''}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no hardware file: it has no keys; conf/hardware has files that do")
    return content


def model(name: str) -> ModelConfig:
    """A file of conf/model, or of its folder of known models, by its name; or a Hugging Face folder, by its path.

    Raises:
        ConfigError: if there is none, with those that there are.
        PartitionError: if Helix cannot partition the folder's model.
    """
    if is_folder(name):
        folder = Path(name).expanduser()
        found = shape_of(folder)
        dims = {key: getattr(found, key) for key in ("layers", "width", "heads", "kv_heads", "head_dim", "mlp_hidden")}
        return ModelConfig(name=folder.resolve().name, kind=PRETRAINED, path=str(folder), **dims)
    return ModelConfig(**_read("model", name))


@cache
def _files(group: str) -> dict[str, Path]:
    """Those that are dims and figures alone: what sets other groups as well only a command can compose."""
    files = sorted((CONF / group).rglob("*.yaml"))
    return {path.stem: path for path in files if "@package _global_" not in path.read_text()}


def is_folder(name: str) -> bool:
    """Whether a name is the path of a folder that transformers has written."""
    return (Path(name).expanduser() / CONFIG).is_file()


def shape(settings: ModelConfig, mode: str) -> TransformerShape:
    """A model's dims as a plan takes them: those of its folder, if it is pretrained and has one.

    Raises:
        ConfigError, PartitionError: if the folder has no model, or Helix cannot partition it.
    """
    if settings.kind == PRETRAINED and settings.path not in (None, PACKAGE):
        found = shape_of(Path(str(settings.path)))
        return planned(found, gated=len(FAMILIES[found.family].mlp.columns) == 2)
    drawn = to_shape(settings)
    return without_pairs(drawn) if mode == "generate" else drawn


def check_named(group: str, name: str) -> Path:
    """The file of a group that has this name.

    Raises:
        ConfigError: if there is none, with those that there are.
    """
    if not CONF.is_dir():
        raise ConfigError(f"{group}={name}: there is no {CONF}; give a ModelConfig and a HardwareConfig")
    files = _files(group)
    stem = name.rpartition("/")[2]
    if stem not in files:
        near = get_close_matches(stem, files, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        path = "a Hugging Face folder" if group == "model" else "a .yaml file"
        raise ConfigError(
            f"there is no {group}={name}{meant}; choose one of: {', '.join(files)}, or the path of {path}"
        )
    return files[stem]


def _read(group: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(check_named(group, name).read_text())
    return content
