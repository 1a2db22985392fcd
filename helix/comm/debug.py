"""Debug mode: every collective of a rank checked before it runs, Helix's own and those of other libraries.

HELIX_DEBUG=1 python infer.py ..          on every rank that Helix launches
with checked(): model(x)                  on ranks that are running; all begin it together
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from helix.comm.checking import Checks
from helix.comm.observe import observe
from helix.config.environment import DEBUG_LIMIT_S


@contextmanager
def checked(limit_s: float = DEBUG_LIMIT_S) -> Iterator[None]:
    """Check the body's collectives (`helix.comm.checking`).

    Args:
        limit_s: seconds after which a rank that comes to none is given up; one that computes alone may take as long.

    Raises:
        Disagreement: on every rank that waits, in one sentence, if ranks differ or one does not come.
    """
    with Checks(limit_s), observe({}, tells=False):
        yield
