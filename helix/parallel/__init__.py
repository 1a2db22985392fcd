"""Applying a partition: the Lightning strategy, gradients, and PyTorch's own tensor parallelism as the peer."""
