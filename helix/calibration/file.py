"""A calibration as a file of conf/hardware."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from helix.calibration.points import MARK
from helix.calibration.results import Calibration
from helix.config.hardware import HardwareConfig
from helix.config.schema import ConfigError
from helix.planner.catalogue import parsed
from helix.study.report import write_whole
from helix.study.statistics import Typical

# The first words of every file that a calibration has written: no other may be overwritten.
_CURVES = ("turns", "products", "attention", "exchanges")


def check_place(folder: Path, name: str, force: bool) -> Path:
    """The path of a file that a calibration may write.

    Raises:
        ConfigError: if it may not, or cannot.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(
            f"--name {name!r} cannot be chosen as hardware=; take letters, digits and _, as this_machine"
        )
    path = folder / f"{name}.yaml"
    if not folder.is_dir():
        raise ConfigError(
            f"--name {name}: there is no folder {folder} to write {path.name} into; give one by --folder"
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--name {name}: {folder} cannot be written to; give another folder by --folder")
    if path.is_dir():
        raise ConfigError(f"--name {name}: {path} is a folder; take another name")
    if path.exists() and not path.read_text().startswith(MARK):
        raise ConfigError(f"--name {name}: {path} is no calibration of yours; take another name, as this_machine")
    if path.exists() and not force:
        raise ConfigError(f"--name {name}: {path} is there already; take another name, or --force to overwrite it")
    return path


def write(found: Calibration, path: Path, header: str) -> None:
    """Write the file at once or not at all.

    Args:
        header: one line that says how it came about.
    """
    text = render(found, header)
    read(text)  # what could not be chosen is not written
    write_whole(text, path)


def read(text: str) -> HardwareConfig:
    """What a file's text says.

    Raises:
        ConfigError: if a value is illegal.
    """
    return parsed(text, "the calibration")


def render(found: Calibration, header: str) -> str:
    """The file's text: each figure with its interval and what it is of beside it."""
    passes = found.points.rounds
    clock = "" if found.points.device == "cuda" else " Cores by their own time, collectives by the clock."
    lines = [
        f"{MARK}: {header}",
        f"# Medians of n = {passes} passes, and their 95 % intervals by order statistics.{clock}",
        "# Shares are 1 where the figure beside them is what was measured, not a peak.",
    ]
    for spec in fields(found.hardware):
        value, note = getattr(found.hardware, spec.name), _note(found, spec.name)
        if spec.name in _CURVES:
            lines += _curve(spec.name, value, f" # {note}")
        else:
            lines.append(f"{spec.name}: {_word(value)}" + (f" # {note}" if note else ""))
    return "\n".join(lines) + "\n"


def _note(found: Calibration, key: str) -> str:
    note = found.notes.get(key, "")
    if key not in found.intervals:
        return note
    return f"{_interval(found.intervals[key])}: {note}"


def _interval(one: Typical) -> str:
    return f"n = {one.count}, 95 % {one.low:.4g} .. {one.high:.4g}"


def _curve(name: str, value: Any, note: str) -> list[str]:
    if not isinstance(value, list):
        return [f"{name}:{note}", *(f"  {each.name}: {_word(getattr(value, each.name))}" for each in fields(value))]
    if not value:
        return [f"{name}: []"]
    lines = [f"{name}:{note}"]
    for row in value:
        first, *rest = (f"{each.name}: {_word(getattr(row, each.name))}" for each in fields(row))
        lines += [f"  - {first}", *(f"    {each}" for each in rest)]
    return lines


def _word(value: object) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_word(each) for each in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
