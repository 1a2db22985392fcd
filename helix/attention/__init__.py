"""The single-device oracle, and attention partitioned over heads and features."""

from helix.attention.layer import HelixAttention

__all__ = ["HelixAttention"]
