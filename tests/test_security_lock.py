"""What `make setup` installs: all that the extras need, each file by its hash, and nothing that names a machine."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^([a-z0-9-]+)==(\S+)(?: ; ([^\\]+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M)


def pins(name: str) -> dict[str, str]:
    """Versions by name, every line of the file accounted for."""
    text = (ROOT / f"requirements/{name}.txt").read_text()
    assert not PIN.sub("", re.sub(r"^#.*\n", "", text, flags=re.M)), f"{name}.txt has a line that is no pin by hashes"
    return {pin[1]: pin[2] for pin in PIN.finditer(text)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_and_the_constraints_agree() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = dict(line.split("==") for line in lines if not line.startswith("#"))
    locked = pins("everywhere")
    assert constraints.items() <= locked.items()
    assert pins("build").items() <= locked.items()
    assert pins("cpu") == {"torch": f"{locked['torch']}+cpu"}
    assert not pins("cuda").keys() & locked.keys()


def test_the_lock_satisfies_pyproject_and_lacks_nothing() -> None:
    """`pip install --no-deps` of it has to be enough: requirements of requirements are there, as installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locked, todo, seen = pins("everywhere"), [], set()
    extras = [each for extra in project["project"]["optional-dependencies"].values() for each in extra]
    todo = [
        Requirement(each)
        for each in [*project["project"]["dependencies"], *extras, *project["build-system"]["requires"]]
    ]
    while todo:
        one = todo.pop()
        name = canonical(one.name)
        assert name in locked, f"{one} is not in requirements/everywhere.txt; run make lock"
        assert one.specifier.contains(locked[name], prereleases=True), f"{one}, and {locked[name]} is locked"
        if (key := (name, frozenset(one.extras))) in seen:
            continue
        seen.add(key)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # not installed here
        for each in map(Requirement, needs):
            wanted = [{"extra": extra} for extra in (*one.extras, "")]
            holds = each.marker is None or any(Marker(str(each.marker)).evaluate(where) for where in wanted)
            if holds and not re.match(r"(nvidia|cuda)-|triton$", canonical(each.name)):
                todo.append(each)


@pytest.mark.parametrize("name", ["everywhere", "cuda", "cpu", "build"])
def test_a_lock_names_no_place(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text()
    assert "file:" not in text
    assert "://" not in text
    assert "--find-links" not in text
