"""What a dry run found, beside what the closed forms say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helix.planner.seconds import Seconds
from helix.study.provenance import command, git_commit, now, versions
from helix.study.report import MethodLabel


@dataclass(frozen=True)
class Pair:
    """A figure as it was traced, and by its closed form; None where there is no such form."""

    traced: float
    predicted: float | None

    @property
    def agrees(self) -> bool | None:
        return None if self.predicted is None else self.traced == self.predicted


@dataclass(frozen=True)
class Collective:
    """One kind of collective: how often a pass has it, and the bytes that leave rank 0 in all of them."""

    calls: int
    bytes: Pair


@dataclass(frozen=True)
class Pass:
    """One pass of a model on rank 0.

    Args:
        name: step; of a pretrained model prompt, and token.
        collectives: by "collective/name".
        flops: of matrix products and attention.
        activations: the most bytes that were alive together, above what was there before; the form is an estimate.
        buffers: how many of those the collectives had made.
        seconds: by part of the model, and in each by kind; None without a machine.
        predicted_seconds: the planner's, None where it knows no such layout.
    """

    name: str
    collectives: Mapping[str, Collective]
    flops: Pair
    activations: Pair
    buffers: int
    seconds: Mapping[str, Mapping[str, float]] | None
    predicted_seconds: Seconds | None

    @property
    def total_s(self) -> float | None:
        return None if self.seconds is None else sum(sum(kinds.values()) for kinds in self.seconds.values())

    def kind_s(self, kind: str) -> float:
        """Seconds of one kind, over all parts."""
        return sum(kinds.get(kind, 0.0) for kinds in (self.seconds or {}).values())


@dataclass(frozen=True)
class Traced:
    """One method.

    Args:
        weights: bytes of rank 0's parameters.
        fullest, busiest: the rank with the most weights, and the one that sends most in a step, by the closed forms
            over all of them, and how many bytes; None where all ranks have the same form.
        cache: bytes of rank 0's keys and values after the last pass; None of a model that keeps none.
        idle_ranks: ranks without work.
        notes: what was assumed of this method, and what the forms leave out.
    """

    method: MethodLabel
    ranks: int
    weights: Pair
    passes: Sequence[Pass]
    fullest: tuple[int, int] | None = None
    busiest: tuple[int, int] | None = None
    cache: Pair | None = None
    idle_ranks: int = 0
    notes: Sequence[str] = ()

    @property
    def peak(self) -> float:
        """Weights, cache and activations of the fullest pass together."""
        cache = 0.0 if self.cache is None else self.cache.traced
        return self.weights.traced + cache + max(each.activations.traced for each in self.passes)


@dataclass(frozen=True)
class Refused:
    """A method that cannot be built for this job, and what it said."""

    method: MethodLabel
    error: str


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """`dry_run.json`.

    Args:
        main: the method that was asked for; `baselines`: the others.
        rank: whose code was traced.
        devices: of the machine that times are of.
        memory_bytes_per_device: of that machine; None if its file does not say.
        batch, length: sequences over all replicas, and tokens of each (of a prompt).
        notes: what holds of all methods: what the times stand on, or why there are none.
        traced_s: how long tracing took, imports apart.
        settings: `helix.config.schema.digest` of the configuration.
    """

    main: Traced
    baselines: Sequence[Traced | Refused] = ()
    rank: int = 0
    devices: int
    memory_bytes_per_device: float | None
    batch: int
    length: int
    parallel: dict[str, Any]
    model: dict[str, Any]
    hardware: dict[str, Any]
    workload: dict[str, Any]
    precision: str
    notes: Sequence[str]
    traced_s: float
    settings: str
    started_at: str = field(default_factory=now)
    versions: dict[str, str] = field(default_factory=versions)
    command: str = field(default_factory=command)
    git_commit: str | None = field(default_factory=git_commit)
