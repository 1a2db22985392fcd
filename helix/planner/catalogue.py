"""Hardware and models by name, as conf/ has them."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import helix
from helix.config.folder import CONFIG, shape_of
from helix.config.schema import PACKAGE, PRETRAINED, ConfigError, HardwareConfig, ModelConfig, to_shape
from helix.config.values import check_values
from helix.partition.architectures import FAMILIES
from helix.partition.shape import TransformerShape
from helix.planner.answering import planned, without_pairs

CONF = Path(helix.__file__).resolve().parent.parent / "conf"


def hardware(name: str) -> HardwareConfig:
    """A file of conf/hardware.

    Raises:
        ConfigError: if there is none, with those that there are; or if it is not as it should be.
    """
    return read(check_named("hardware", name))


def read(path: Path) -> HardwareConfig:
    """A hardware file.

    Raises:
        ConfigError: if it is not as it should be.
    """
    try:
        content = OmegaConf.merge(OmegaConf.structured(HardwareConfig), yaml.safe_load(path.read_text()))
        found = cast(HardwareConfig, OmegaConf.to_object(content))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is no hardware file: {' '.join(str(error).split())}") from error
    check_values(found, "hardware.")
    return found


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
        other = ", or the path of a Hugging Face folder" if group == "model" else ""
        raise ConfigError(f"there is no {group}={name}{meant}; choose one of: {', '.join(files)}{other}")
    return files[stem]


def _read(group: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(check_named(group, name).read_text())
    return content
