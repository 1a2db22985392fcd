"""Whether a grid's schedules compute, on the ranks at hand, what one device computes: `helix.verify`."""
