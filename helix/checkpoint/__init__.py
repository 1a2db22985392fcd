"""Checkpoints: written whole or not at all, checksummed, free of pickle, and loadable on any grid."""
