"""What a command is configured with: typed schemas, and every check that can be made before anything is launched.

No torch here, so that wrong input is refused within a second.
"""
