"""What a command is configured with: typed schemas, checks made before anything is launched, and their errors.

No torch here, so that wrong input is refused within a second.
"""
