"""What stops the build."""

from __future__ import annotations


class ReportError(Exception):
    """The report cannot be built, in one sentence that says what to mend."""
