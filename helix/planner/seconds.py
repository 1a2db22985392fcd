"""Time, by what it is spent on."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Seconds:
    """Seconds of one device.

    Args:
        matmul: projections, MLPs, experts and the head.
        attention: the core, Q K^T and P V.
        memory: operations that only read and write: norms, activations, residuals; and the optimizer.
        exchange: collectives and messages. None is hidden behind computation unless a method's own form says so.
        waiting: a pipeline's bubble.
        dispatch: finding out what to compute, where that is not hidden behind computing it.
    """

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    exchange: float = 0.0
    waiting: float = 0.0
    dispatch: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory + self.exchange + self.waiting + self.dispatch

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.memory + other.memory,
            self.exchange + other.exchange,
            self.waiting + other.waiting,
            self.dispatch + other.dispatch,
        )

    def __mul__(self, times: float) -> Seconds:
        return Seconds(
            self.matmul * times,
            self.attention * times,
            self.memory * times,
            self.exchange * times,
            self.waiting * times,
            self.dispatch * times,
        )

    def shares(self) -> dict[str, float]:
        """Each part of the whole, the largest first."""
        total = self.total or 1.0
        parts = {spec.name: getattr(self, spec.name) / total for spec in fields(self)}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))
