"""Other libraries' collectives in debug mode: checked, and in the flight record; `helix.comm.observe` sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from helix.flight import ring
from helix.flight.checking import Checks, Rows

# What every rank puts in has one shape, in the order of c10d's arguments and of the functional ones'.
_EVEN = ("all_reduce", "all_gather", "reduce_scatter", "reduce", "gather", "broadcast", "all_to_all")
_SENT = ("input", "inputs", "input_tensor", "input_tensors", "input_list", "tensor", "tensors")


def meet(checks: Checks, collective: str, group: dist.ProcessGroup, arguments: Mapping[str, Any]) -> None:
    """Note a collective that is about to start, and wait for its ranks.

    By the group's own description: what an observer calls it, a rank that does not listen need not know.

    Args:
        collective: as `helix.comm.observe` names it.
        arguments: the operator's, by name.

    Raises:
        Disagreement: if a rank does not come, or with another one.
    """
    tensors, axis = put_in(arguments), group.group_desc or group.group_name
    rows = _rows(arguments) if collective == "all_to_all" else None
    shape, dtype = None, None
    if collective in _EVEN and tensors:
        dtype = tensors[0].dtype
        # Several are compared by the number of their entries.
        shape = tensors[0].shape if len(tensors) == 1 else (sum(x.numel() for x in tensors),)
    entry = ring.come(f"{collective}/{axis}", axis, group, 0, shape, dtype)
    checks.meet(entry, rows)
    entry.enqueue()  # the library itself waits for the rest


def put_in(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that this rank puts in, flat; none of a barrier."""
    return _tensors(next((arguments[name] for name in _SENT if name in arguments), ()))


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
