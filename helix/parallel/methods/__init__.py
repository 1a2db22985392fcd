"""Helix and its rivals behind one interface, on the same ranks of one launch."""
