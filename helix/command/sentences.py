"""What `python -m helix` says on stderr."""

from __future__ import annotations

import errno
import sys


def complain(reason: str, kind: str = "error") -> None:
    """Say what is wrong, as one line."""
    print(f"python -m helix: {kind}: {' '.join(reason.split())}", file=sys.stderr)


def told(error: OSError) -> str:
    """What to say of a path that no file can have, wherever it is first looked for.

    Raises:
        OSError: any other, which is a failure and no wrong input.
    """
    if error.errno != errno.ENAMETOOLONG:
        raise error
    return f"{error.filename} is too long for a file's name; give another path"
