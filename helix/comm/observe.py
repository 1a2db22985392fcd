"""Counting the collectives of other libraries, for the listeners of `helix.comm.record`.

    with record() as log, observe({mesh.get_group("tp").group_name: "tp"}):
        dtensor_model(x)
    log.bytes["all_gather/tp"]

It sees what passes PyTorch's dispatcher: torch.distributed's own collectives (namespace c10d; DeepSpeed's are
these too), the functional ones (_c10d_functional; DTensor's) and point-to-point transfers (pipelining's). In debug
mode each is checked as Helix's own are (`helix.flight.checking`), but for transfers, whose order is the library's own.
Collectives are waited for where they are started, so that each one's span is its own; a library that overlaps
them with its computing loses that while it is observed. Point-to-point transfers are not: a send can wait for a
receive that the other rank posts only after its own send. Theirs end where the library itself waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helix.comm.foreign import meet, put_in
from helix.comm.record import Call, being_told, listening, telling
from helix.flight import checking
from helix.partition import wire

# Operators by name, since PyTorch's versions do not have the same ones: what each is counted as.
_COLLECTIVES: dict[str, dict[str, str]] = {
    "c10d": {
        "allreduce_": "all_reduce",
        "allreduce_coalesced_": "all_reduce",
        "allgather_": "all_gather",
        "allgather_coalesced_": "all_gather",
        "allgather_into_tensor_coalesced_": "all_gather",
        "_allgather_base_": "all_gather",
        "reduce_scatter_": "reduce_scatter",
        "reduce_scatter_tensor_coalesced_": "reduce_scatter",
        "_reduce_scatter_base_": "reduce_scatter",
        "alltoall_": "all_to_all",
        "alltoall_base_": "all_to_all",
        "broadcast_": "broadcast",
        "send": "send",
        "recv_": "recv",
        "reduce_": "reduce",
        "gather_": "gather",
        "scatter_": "scatter",
        "barrier": "barrier",
    },
    "_c10d_functional": {
        "all_reduce": "all_reduce",
        "all_reduce_": "all_reduce",
        "all_reduce_coalesced": "all_reduce",
        "all_reduce_coalesced_": "all_reduce",
        "all_gather_into_tensor": "all_gather",
        "all_gather_into_tensor_out": "all_gather",
        "all_gather_into_tensor_coalesced": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter_tensor_out": "reduce_scatter",
        "reduce_scatter_tensor_coalesced": "reduce_scatter",
        "all_to_all_single": "all_to_all",
        "broadcast": "broadcast",
        "broadcast_": "broadcast",
    },
}
_COLLECTIVES["_c10d_functional_autograd"] = _COLLECTIVES["_c10d_functional"]
_UNCOUNTED = ("reduce", "gather", "scatter", "barrier")  # which debug mode checks all the same
_met = False  # whether what runs now was met by an observer further in


@contextmanager
def observe(names: Mapping[str, str], tells: bool = True) -> Iterator[None]:
    """Tell the listeners of every collective that other libraries start in the body, on this thread.

    Each is told as "collective/axis", where collective is all_reduce, all_gather, reduce_scatter, all_to_all,
    broadcast, send or recv; the bytes of a transfer count at its sender. Groups of one rank move nothing and are
    not told of, nor is what `helix.comm.transport` tells of already; of torch.distributed's reduce, gather and
    scatter nothing is. Modes nest: each collective is told once.

    Args:
        names: the axis by `group.group_name`, for one collective of a group by "collective/group_name", or by
            `group.group_desc`; a group without a name here goes by its own description.
        tells: whether the listeners are told; else collectives are only checked, in debug mode.
    """
    mode = _Observer(names, tells)
    with _waits_seen_by(mode), mode:
        yield


class _Observer(TorchDispatchMode):
    def __init__(self, names: Mapping[str, str], tells: bool = True) -> None:
        super().__init__()
        self._names, self._tells = names, tells
        # Transfers under way. NCCL hands out one Work for a whole batch of them, which then have none of their own.
        self._transfers: dict[dist.Work, Call] = {}
        self._batch: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # they first turn it into collectives and plain operators, which come here again
        kwargs = kwargs or {}
        space, _, operator = func.name().partition("::")
        collective = _COLLECTIVES.get(space, {}).get(operator.partition(".")[0])
        tells = self._tells and listening() and collective not in _UNCOUNTED
        # Ranks need not all listen: what they meet, and in which order, does not depend on it.
        checks = None if _met or collective in ("send", "recv") else checking.active()
        if collective is None or types or being_told() or not (tells or checks):
            return func(*args, **kwargs)
        arguments = {field.name: value for field, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        group = _group(arguments)
        if group.size() == 1:
            return func(*args, **kwargs)
        if checks is not None:
            meet(checks, collective, group, arguments)
        if not tells:
            with _meeting():
                return func(*args, **kwargs)
        axis, given = self._axis(collective, group), put_in(arguments)
        nbytes, ranks = _BYTES[collective](given, group, arguments), _ranks(arguments, group)
        with telling(f"{collective}/{axis}", nbytes, ranks, given[0].device) as call:
            out = func(*args, **kwargs)
            if collective in ("send", "recv"):
                self._remember(call, out)
            else:
                _wait(out)
                call.finish()
        return out

    def _axis(self, collective: str, group: dist.ProcessGroup) -> str:
        name, description = group.group_name, group.group_desc
        keys = (f"{collective}/{name}", name, description)
        return next((self._names[key] for key in keys if key in self._names), description or name)

    def _remember(self, call: Call, out: Any) -> None:
        work = _work(out)
        if work is None:
            self._batch.append(call)
        else:
            self._transfers[work] = call

    @contextmanager
    def waiting(self, work: dist.Work) -> Iterator[None]:
        """Around a library's wait: ends the transfer that it waits for."""
        if being_told():  # the wait is our own
            yield
            return
        call = self._transfers.pop(work, None)
        calls = [call] if call else self._batch
        for call in calls:
            call.block()
        yield
        for call in calls:
            call.finish()
        if calls is self._batch:
            self._batch = []


@contextmanager
def _meeting() -> Iterator[None]:
    """Around a collective whose ranks have met, for the observers further out."""
    global _met
    before, _met = _met, True
    try:
        yield
    finally:
        _met = before


@contextmanager
def _waits_seen_by(mode: _Observer) -> Iterator[None]:
    """`Work.wait` does not pass the dispatcher, and gloo's transfers cannot be waited for twice."""
    wait: Callable[..., bool] = dist.Work.wait

    def seen(work: dist.Work, *args: Any, **kwargs: Any) -> bool:
        with mode.waiting(work):
            return wait(work, *args, **kwargs)

    setattr(dist.Work, "wait", seen)  # noqa: B010  the type checker knows that it is a method
    try:
        yield
    finally:
        setattr(dist.Work, "wait", wait)  # noqa: B010


def _wait(out: Any) -> None:
    """Until a collective is complete: for a Work, or for each tensor of a functional collective."""
    work = _work(out)
    if work is not None:
        work.wait()
        return
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(tensor, Tensor):
            torch.ops._c10d_functional.wait_tensor(tensor)


def _work(out: Any) -> dist.Work | None:
    """The Work among an operator's results; None if there is none, or NCCL gave none out."""
    last = out[-1] if isinstance(out, tuple) else out
    return dist.Work.unbox(last) if isinstance(last, torch.ScriptObject) else None


def _group(arguments: dict[str, Any]) -> dist.ProcessGroup:
    group: Any = arguments.get("process_group", arguments.get("group_name"))
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _ranks(arguments: dict[str, Any], group: dist.ProcessGroup) -> tuple[int, ...]:
    """Global ranks of the group, or of a transfer's (source, destination)."""
    ranks, own = dist.get_process_group_ranks(group), dist.get_rank()
    if "dst" in arguments:
        return own, ranks[arguments["dst"]]
    if "src" in arguments and "tag" in arguments:
        return ranks[arguments["src"]], own
    return tuple(ranks)


def _all_reduce(sent: Sequence[Tensor], group: dist.ProcessGroup, arguments: dict[str, Any]) -> int:
    return sum(wire.all_reduce(x.numel(), group.size(), x.element_size()) for x in sent)


def _all_gather(sent: Sequence[Tensor], group: dist.ProcessGroup, arguments: dict[str, Any]) -> int:
    return sum(wire.all_gather(x.numel(), group.size(), x.element_size()) for x in sent)


def _reduce_scatter(sent: Sequence[Tensor], group: dist.ProcessGroup, arguments: dict[str, Any]) -> int:
    if "input_tensors" in arguments:  # one tensor for each rank, of one size
        return wire.reduce_scatter(sum(x.numel() for x in sent), group.size(), sent[0].element_size())
    return sum(wire.reduce_scatter(x.numel(), group.size(), x.element_size()) for x in sent)


def _all_to_all(sent: Sequence[Tensor], group: dist.ProcessGroup, arguments: dict[str, Any]) -> int:
    whole, rank, itemsize = sum(x.numel() for x in sent), group.rank(), sent[0].element_size()
    if "input_tensors" in arguments:  # one tensor for each rank
        return wire.all_to_all(whole, sent[rank].numel(), itemsize)
    rows = arguments["input_split_sizes"]
    own = rows[rank] * whole // max(sum(rows), 1) if rows else whole // group.size()
    return wire.all_to_all(whole, own, itemsize)


def _broadcast(sent: Sequence[Tensor], group: dist.ProcessGroup, arguments: dict[str, Any]) -> int:
    # c10d counts the root within the group, and so do the functional ones.
    root = arguments["root_rank"] if "root_rank" in arguments else arguments["src"]
    is_root = root == group.rank()
    return sum(wire.broadcast(x.numel(), group.size(), x.element_size(), is_root) for x in sent)


def _send(sent: Sequence[Tensor], group: dist.ProcessGroup, arguments: dict[str, Any]) -> int:
    return sum(x.numel() * x.element_size() for x in sent)


def _receive(sent: Sequence[Tensor], group: dist.ProcessGroup, arguments: dict[str, Any]) -> int:
    return 0


_BYTES: dict[str, Callable[[Sequence[Tensor], dist.ProcessGroup, dict[str, Any]], int]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send": _send,
    "recv": _receive,
}
