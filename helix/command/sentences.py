"""What `python -m helix` says on stderr."""

from __future__ import annotations

import sys


def complain(reason: str, kind: str = "error") -> None:
    """Say what is wrong, as one line."""
    print(f"python -m helix: {kind}: {' '.join(reason.split())}", file=sys.stderr)
