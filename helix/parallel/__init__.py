"""Applying a partition: the Lightning strategy, gradients, precision, and `methods/`, the ways to cut a model."""
