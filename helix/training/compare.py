"""A sweep's trainings by setting: the same but for the seed, and each setting beside the one it is held against.

What is compared is the first key of the command line that has several values, the seed apart: put the question's
key first. Its first value is the reference, at equal values of all others. Runs of one seed have the same data in
the same order and are pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from helix.command.sweep import SweepJob, labels, report_of
from helix.study.statistics import summarize, t_interval

TrainReports: TypeAlias = dict[int, dict[str, Any]]  # train_report.json by seed
Curve: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in their seed only.

    Args:
        label: a short name.
        reports: of its finished jobs.
        reference: what it is held against; None where others are held against it, or nothing is compared.
    """

    label: str
    reports: TrainReports
    reference: Setting | None = None

    @property
    def pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The reports of both, by seed."""
        others = self.reference.reports if self.reference is not None else {}
        return [(self.reports[seed], others[seed]) for seed in sorted(self.reports.keys() & others.keys())]


@dataclass(frozen=True)
class Estimate:
    """A mean over runs, or over pairs of them, and its 95 % t-interval; NaN where there are too few for one."""

    runs: int
    mean: float
    low: float
    high: float


def settings_of(jobs: Sequence[SweepJob]) -> list[Setting]:
    """The settings of a sweep, in the order of their first jobs; those without a finished job too."""
    groups: dict[tuple[str, ...], list[SweepJob]] = {}
    for job in jobs:
        groups.setdefault(_without(job.overrides, "seed"), []).append(job)
    names = labels([replace(own[0], overrides=overrides) for overrides, own in groups.items()])
    compared = _first_varying(list(groups))
    found: list[Setting] = []
    references: dict[tuple[str, ...], Setting] = {}
    for (overrides, own), name in zip(groups.items(), names, strict=True):
        done = [report for job in own if (report := report_of(job.folder, job.settings)) is not None]
        others = _without(overrides, compared)
        setting = Setting(name, {int(report["seed"]): report for report in done}, references.get(others))
        references.setdefault(others, setting)
        found.append(setting)
    return found


def final_bpb(setting: Setting) -> Estimate:
    """The validation after the last step, in bits per byte."""
    return estimate([_number(report["validation_bpb"]) for report in setting.reports.values()])


def difference(setting: Setting) -> Estimate:
    """By how much that is above the reference's, over pairs."""
    pairs = setting.pairs
    return estimate([_number(own["validation_bpb"]) - _number(other["validation_bpb"]) for own, other in pairs])


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        mean = sum(values) / len(values) if values else math.nan
        return Estimate(len(values), mean, math.nan, math.nan)
    summary = summarize(values)
    return Estimate(len(values), summary.mean, *summary.ci95)


def loss_gaps(setting: Setting) -> Curve | None:
    """gaps[pair, step]: how far the training loss is from the reference's, in nats a token; None without a pair."""
    if not (pairs := setting.pairs):
        return None
    own, other = (together([curve(report["losses"]) for report in side]) for side in zip(*pairs, strict=True))
    steps = min(own.shape[-1], other.shape[-1])
    return np.abs(own[:, :steps] - other[:, :steps])


def curve(values: Sequence[float | None]) -> Curve:
    """Figures of a report; null, which stands for what is not finite, becomes NaN."""
    return np.array([_number(value) for value in values], dtype=np.float64)


def together(curves: Sequence[Curve]) -> Curve:
    """curves[run, step], cut to the shortest."""
    steps = min(len(each) for each in curves)
    return np.stack([each[:steps] for each in curves])


def band(curves: Curve) -> tuple[Curve, Curve, Curve]:
    """Mean over runs and the ends of its 95 % t-interval, at each step; curves[run, step]."""
    mean, _, half = t_interval(curves.T)
    return mean, mean - half, mean + half


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _without(overrides: tuple[str, ...], key: str | None) -> tuple[str, ...]:
    return tuple(one for one in overrides if _key(one) != key)


def _first_varying(overrides: Sequence[tuple[str, ...]]) -> str | None:
    """The first key whose values differ."""
    values: dict[str, set[str]] = {}
    for one in (one for each in overrides for one in each):
        values.setdefault(_key(one), set()).add(one)
    return next((key for key, found in values.items() if len(found) > 1), None)
