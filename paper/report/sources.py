"""The stored results that the report is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from helix.claims.ledger import Ledger, read
from paper.report.errors import ReportError

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Sources:
    """Results by name, the newest of several dates, and the claims ledger; it notes which files were read.

    Args:
        root: of the repository.
    """

    root: Path = ROOT
    used: set[Path] = field(default_factory=set)
    _read: dict[Path, Any] = field(default_factory=dict)

    def json(self, name: str) -> Any:
        return self._content(name, ".json", lambda path: json.loads(path.read_text()))

    def table(self, name: str) -> pd.DataFrame:
        found: pd.DataFrame = self._content(name, ".csv", pd.read_csv)
        return found

    @cached_property
    def ledger(self) -> Ledger:
        path = self.root / "paper/claims.yaml"
        self.used.add(path)
        return read(path)

    def _content(self, name: str, suffix: str, parse: Any) -> Any:
        path = self.path(name, suffix)
        if path not in self._read:
            self._read[path] = parse(path)
        self.used.add(path)
        return self._read[path]

    def path(self, name: str, suffix: str) -> Path:
        """The newest result of this name.

        Raises:
            ReportError: if there is none.
        """
        folder = self.root / "paper/results"
        found = sorted(path for path in folder.glob(f"*{suffix}") if path.stem.partition("_")[2] == name)
        if not found:
            raise ReportError(f"{folder.relative_to(self.root)} has no result DATE_{name}{suffix}")
        return found[-1]

    def days(self) -> list[str]:
        """The dates of the results that were read, in order."""
        return sorted({path.stem.partition("_")[0] for path in self.used if path.parent.name == "results"})

    def count_dirty(self) -> int:
        """How many of the results that were read are of a commit with changes that it does not have."""
        contents = [each for each in self._read.values() if isinstance(each, dict)]
        commits = [each.get("git_commit") or each.get("about", {}).get("commit") or "" for each in contents]
        return sum(commit.endswith("-dirty") for commit in commits)
