"""What a verification found, on which machine, and the verdict. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helix.certify.cases import Case, Subject


@dataclass(frozen=True)
class Check:
    """One tensor of one rank against the oracle's.

    Args:
        tensor: "output", "gradient of wq" and so on.
        error: the largest deviation relative to the scale (`helix.certify.bounds`); infinite where it is no number.
        bound: what rounding explains.
    """

    tensor: str
    error: float
    bound: float

    @property
    def ratio(self) -> float:
        return self.error / self.bound

    @property
    def is_gradient(self) -> bool:
        return self.tensor.startswith("gradient")

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Traffic:
    """Bytes that left one rank in one collective, or that its cache holds.

    Args:
        phase: "forward", "backward", "gradient sync", "prompt", "step", "cache".
        key: "collective/name".
    """

    phase: str
    key: str
    executed: int
    predicted: int

    @property
    def passed(self) -> bool:
        return self.executed == self.predicted


@dataclass(frozen=True)
class Copy:
    """A tensor that several ranks hold, which has to be the same on all of them to the last bit.

    Args:
        holders: which ranks those are, in words; the same words on all of them.
        digest: of this rank's bytes.
    """

    tensor: str
    holders: str
    digest: int


@dataclass(frozen=True)
class Found:
    """What one rank found of one case."""

    checks: tuple[Check, ...]
    traffic: tuple[Traffic, ...]
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True)
class Row:
    """One case over all ranks.

    Args:
        found: of each rank, by rank.
    """

    case: Case
    found: tuple[Found, ...]

    @property
    def worst_output(self) -> Check | None:
        return self._worst([each for each in self._checks() if not each.is_gradient])

    @property
    def worst_gradient(self) -> Check | None:
        return self._worst([each for each in self._checks() if each.is_gradient])

    @property
    def sent_bytes(self) -> int:
        """Of the rank that sent the most."""
        totals = (sum(each.executed for each in one.traffic if each.phase != "cache") for one in self.found)
        return max(totals)

    @property
    def bytes_agree(self) -> bool:
        return all(each.passed for one in self.found for each in one.traffic)

    @property
    def passed(self) -> bool:
        return next(self.failures(), None) is None

    def failures(self) -> Iterator[str]:
        """What is wrong, each a sentence that names rank, schedule, precision and tensor.

        Outputs come before gradients, which a wrong output makes wrong as well, and the worst ones first.
        """
        wrong = [(rank, check) for rank, check in self._ranked() if not check.passed]
        for rank, check in sorted(wrong, key=lambda each: (each[1].is_gradient, -each[1].ratio)):
            yield (
                f"rank {rank}, {self.case.name}: the {check.tensor} is off by {check.error:.1e}, and rounding "
                f"explains {check.bound:.1e}"
            )
        yield from self._wrong_bytes()
        yield from self._wrong_copies()

    def _wrong_bytes(self) -> Iterator[str]:
        for rank, one in enumerate(self.found):
            for each in one.traffic:
                if not each.passed:
                    what = "holds" if each.phase == "cache" else "sent"
                    yield (
                        f"rank {rank}, {self.case.name}: {what} {each.executed:,} bytes of {each.key} ({each.phase}), "
                        f"and {each.predicted:,} are predicted"
                    )

    def _wrong_copies(self) -> Iterator[str]:
        for key in dict.fromkeys((copy.tensor, copy.holders) for one in self.found for copy in one.copies):
            held = {
                rank: copy.digest
                for rank, one in enumerate(self.found)
                for copy in one.copies
                if (copy.tensor, copy.holders) == key
            }
            common = Counter(held.values()).most_common(1)[0][0]
            others = [rank for rank, digest in held.items() if digest != common]
            if others:
                tensor, holders = key
                yield f"rank {others[0]}, {self.case.name}: the {tensor} differs from that of other ranks of {holders}"

    def _ranked(self) -> Iterator[tuple[int, Check]]:
        return ((rank, check) for rank, one in enumerate(self.found) for check in one.checks)

    def _checks(self) -> Iterator[Check]:
        return (check for _, check in self._ranked())

    @staticmethod
    def _worst(checks: Sequence[Check]) -> Check | None:
        return max(checks, key=lambda check: check.ratio, default=None)


@dataclass(frozen=True)
class Certificate:
    """Whether what ran here is exact, and what was held against what.

    Args:
        subject: the function and its partition, at the size that was verified.
        rows: each case.
        backend: of the collectives.
        hosts: of each rank.
        devices: of each rank.
        about: versions, command, commit, time and machine.
        omitted: what was not verified, and why.
    """

    subject: Subject
    rows: tuple[Row, ...]
    backend: str
    hosts: tuple[str, ...]
    devices: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """A sentence for each thing that is wrong; empty if all is exact."""
        return [sentence for row in self.rows for sentence in row.failures()]

    def verdict(self) -> str:
        """The whole in a sentence, which names the first failure: the first case that failed, its worst tensor."""
        if self.passed:
            return f"{self.subject.grid.name} is exact here in {len(self.rows)} of {len(self.rows)} cases"
        failed = [row for row in self.rows if not row.passed]
        first = next(failed[0].failures())
        return f"{self.subject.grid.name} is not exact here in {len(failed)} of {len(self.rows)} cases; {first}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "failures": self.failures,
            "grid": {"name": self.subject.grid.name, "m": self.subject.grid.m, "n": self.subject.grid.n},
            "subject": asdict(self.subject),
            "world_size": len(self.hosts),
            "backend": self.backend,
            "hosts": list(self.hosts),
            "devices": list(self.devices),
            "omitted": list(self.omitted),
            "cases": [_row(row) for row in self.rows],
            **self.about,
        }

    def write(self, path: Path) -> None:
        """As JSON, in which an infinite error is null."""
        path.write_text(json.dumps(_finite(self.as_dict()), indent=1, allow_nan=False) + "\n")


def _row(row: Row) -> dict[str, Any]:
    return {
        "case": asdict(row.case),
        "passed": row.passed,
        "ranks": [
            {
                "tensors": {each.tensor: {"error": each.error, "bound": each.bound} for each in one.checks},
                "bytes": [asdict(each) for each in one.traffic],
                "copies": [asdict(each) for each in one.copies],
            }
            for one in row.found
        ],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
