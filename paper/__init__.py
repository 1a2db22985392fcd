"""The report: its text, the measurement and the build behind it; no part of the library."""
