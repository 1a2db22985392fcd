"""What can go wrong while text is generated."""

from __future__ import annotations


class Diverged(RuntimeError):
    """Ranks that chose different tokens."""
