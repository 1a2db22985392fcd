"""Pictures: one style, readable in print and in grey; functions from stored figures to a matplotlib `Figure`."""
