"""Measuring: a text to run on, statistics of repeated runs, the report, its table, and the W&B run."""
