"""What can go wrong while text is generated."""

from __future__ import annotations


class Diverged(RuntimeError):
    """Ranks that chose different tokens."""


class CannotRun(RuntimeError):
    """The method that was asked for failed in its first answer, in its own words."""
