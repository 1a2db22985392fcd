"""Commands: Hydra's command line, composing and refusing jobs before any starts, sweeps that can be taken up again.

No torch here, so that wrong input is refused within a second.
"""
