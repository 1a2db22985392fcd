"""How a model's attention is laid over its grid, by the names that configs use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionOptions:
    """The choices that `HelixAttention` documents; `residual` is the layout of the stream between blocks."""

    schedule: str = "auto"
    aggregate: str = "project"
    concat: str = "hierarchical"
    projection: str = "column"
    residual: str = "sharded"
