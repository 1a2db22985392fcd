"""Other libraries' collectives in the flight record, and checked in debug mode; `helix.comm.observe` sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from helix.comm import checking, flight
from helix.comm.checking import Rows

# What every rank puts in has one shape, in the order of c10d's arguments and of the functional ones'.
_EVEN = ("all_reduce", "all_gather", "reduce_scatter", "reduce", "gather", "broadcast", "all_to_all")
_SENT = ("input", "inputs", "input_tensor", "input_tensors", "input_list", "tensor", "tensors")


def meet(collective: str, axis: str, group: dist.ProcessGroup, arguments: Mapping[str, Any]) -> None:
    """Note a collective that is about to start, and in debug mode wait for its ranks.

    Args:
        collective: as `helix.comm.observe` names it.
        axis: of the mesh, or the group's own description.
        arguments: the operator's, by name.

    Raises:
        Disagreement: in debug mode, if a rank does not come, or with another one.
    """
    tensors = _tensors(next((arguments[name] for name in _SENT if name in arguments), ()))
    rows = _rows(arguments) if collective == "all_to_all" else None
    shape, dtype = None, None
    if collective in _EVEN and tensors:
        dtype = tensors[0].dtype
        # Several are compared by the number of their entries.
        shape = tensors[0].shape if len(tensors) == 1 else (sum(x.numel() for x in tensors),)
    entry = flight.come(f"{collective}/{axis}", axis, group, 0, shape, dtype)
    if (checks := checking.active()) is not None:
        checks.meet(entry, rows)
    entry.end()  # of waiting: the library itself waits for the rest


def _rows(arguments: Mapping[str, Any]) -> Rows | None:
    """What an all-to-all sends to and receives from each rank, if it says so: rows of a tensor, or whole tensors."""
    if "output_tensors" in arguments:
        sent, due = _tensors(arguments["input_tensors"]), _tensors(arguments["output_tensors"])
        return [x.numel() for x in sent], [x.numel() for x in due]
    send, receive = arguments.get("input_split_sizes"), arguments.get("output_split_sizes")
    return (list(send), list(receive)) if send and receive else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for entry in value for tensor in _tensors(entry)]
