"""Mesh, differentiable counted collectives, and launching ranks."""
