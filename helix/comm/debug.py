"""Debug mode: every collective of a rank checked before it runs, Helix's own and those of other libraries.

HELIX_DEBUG=1 python infer.py ..          on every rank that Helix launches
with checked(): model(x)                  on ranks that are running; all begin it together
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from helix.comm.observe import observe
from helix.config.environment import DEBUG_LIMIT_S
from helix.flight.checking import Checks, active


@contextmanager
def checked(limit_s: float = DEBUG_LIMIT_S) -> Iterator[None]:
    """Check the body's collectives (`helix.flight.checking`); where they are checked already, those checks go on.

    Args:
        limit_s: seconds after which a rank that comes to none is given up; one that computes alone may take as long.
            Of checks inside checks the outer's holds.

    Raises:
        Disagreement: on every rank that waits, in one sentence, if ranks differ or one does not come.
    """
    if active() is not None:  # collectives have one count
        yield
        return
    with Checks(limit_s), observe({}, tells=False):
        yield
