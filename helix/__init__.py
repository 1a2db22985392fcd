"""Two-level partitioned attention: heads in n groups, every head's features in m slices.

Names are loaded when first used: `import helix` costs nothing, and neither DeepSpeed nor Lightning comes with
any of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helix.attention import HelixAttention as HelixAttention
    from helix.certify.run import verify as verify
    from helix.comm.mesh import Mesh as Mesh
    from helix.partition.grid import Grid as Grid
    from helix.partition.grid import PartitionError as PartitionError
    from helix.planner.plan import plan as plan
    from helix.pretrained.helixify import helixify as helixify
    from helix.ranks.launch import launch as launch

__version__ = "0.1.0"
__all__ = ["Grid", "HelixAttention", "Mesh", "PartitionError", "helixify", "launch", "plan", "verify"]

_HOMES = {
    "Grid": "helix.partition.grid",
    "HelixAttention": "helix.attention",
    "Mesh": "helix.comm.mesh",
    "PartitionError": "helix.partition.grid",
    "helixify": "helix.pretrained.helixify",
    "launch": "helix.ranks.launch",
    "plan": "helix.planner.plan",
    "verify": "helix.certify.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # found here the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
