"""A method's first steps: whether it runs at all, whether it is right, what it moves and what it holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from helix.checkpoint.content import CheckpointError
from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.parallel.methods.build import build
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition.between_hosts import Pairs
from helix.partition.function import Function, function_of
from helix.partition.grid import PartitionError
from helix.partition.placement import ACROSS, INSIDE, hosts_placed
from helix.ranks.failure import exhausted
from helix.ranks.hosts import Hosts
from helix.ranks.process_group import hosts
from helix.study.accuracy import Oracle, name_of, relative_error
from helix.study.destinations import Destinations
from helix.study.memory import PeakMemory

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One rank's figures of a method that runs.

    Args:
        reference, relative_error, relative_error_to_h_heads: see `helix.study.report.Accuracy`; the errors are
            known to rank 0 only.
        executed, predicted: bytes that this rank sent in one step, by "collective/name"; predicted is None for a
            method without closed forms.
        weight_bytes, predicted_weight_bytes: of this rank's parameters.
        activation_bytes: growth of this rank's memory over the second step; see `PeakMemory`.
        idle_ranks, bubble: see `helix.parallel.methods.method.Method`.
        output_sha256: of the first step's logits; known to rank 0 only.
        between: bytes that left this rank's host in one step, by "collective/name" and host.
        predicted_between: of all ranks, for each placement by "collective/name" and (sending, receiving) host; on
            rank 0 only, and where there are several hosts.
    """

    reference: str
    relative_error: float | None
    relative_error_to_h_heads: float | None
    executed: dict[str, int]
    predicted: dict[str, int] | None
    weight_bytes: int
    predicted_weight_bytes: int | None
    activation_bytes: int
    idle_ranks: int
    bubble: float | None
    output_sha256: str | None = None
    between: dict[str, Counter[int]] = field(default_factory=dict)
    predicted_between: dict[str, dict[str, Pairs]] | None = None


class Refused(Exception):
    """A method that cannot run this job, in its own words."""


def try_out(
    kind: str, layout: Layout, job: Job, tokens: Tensor, oracle: Oracle, mesh: Mesh | None = None
) -> tuple[Method, Trial]:
    """Build a method and run two steps, the second one counted. All ranks call it.

    Args:
        kind: a name of `helix.config.parallel.METHODS` or `PEERS`.
        tokens: [B, T] on this rank's device.
        oracle: of the same tokens.
        mesh: see `helix.parallel.methods.build.build`.

    Raises:
        Refused: on every rank, if the method raised on any of them.
    """
    method = together(lambda: build(kind, job, layout, mesh))
    output = together(lambda: _step(method, tokens))
    return method, together(lambda: _check(method, output, tokens, oracle))


@torch.inference_mode()
def _step(method: Method, tokens: Tensor) -> Tensor | None:
    return method.step(tokens)


def together(run: Callable[[], T]) -> T:
    """Run something on every rank; if it raises on any, raise on all.

    A refusal comes on all ranks at the same place, as they run the same code on the same shapes. What need not,
    memory that runs out, ends the launch: the others may be waiting in a collective.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = run()
    except Exception as raised:  # a peer may raise anything: its words are the result
        if exhausted(raised):
            raise
        error = raised
    _agree(error)
    return cast(T, result)


def _agree(error: Exception | None) -> None:
    """Have every rank know of an error on any of them."""
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else _words(error))
    if words := next((each for each in said if each is not None), None):
        raise Refused(words) from error


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PartitionError | CheckpointError) else f"{type(error).__name__}: {text}"


@torch.inference_mode()
def _check(method: Method, output: Tensor | None, tokens: Tensor, oracle: Oracle) -> Trial:
    function = function_of(method.layout.options, method.layout.grid)
    logits = method.whole_logits(output)
    own = method.expected_logits(tokens)
    expected, routes = oracle.answer(function)
    to_h_heads = None
    if function.slices > 1:
        h_heads, _ = oracle.answer(Function(1, function.block, function.projects))
        to_h_heads = _error(logits, h_heads)
    # Of the second step: a launch's very first one also fills what libraries keep for the process, some 14 MB on the
    # CPU, and whoever came first would pay for all.
    memory = PeakMemory(method.job.device)
    log = Destinations()
    with record(log), method.observed():
        method.step(tokens)
    growth = memory.growth()
    predicted = method.predicted(routes)
    return Trial(
        reference="own_model_single" if own is not None else name_of(function),
        relative_error=_error(logits, own if own is not None else expected),
        relative_error_to_h_heads=to_h_heads,
        executed=dict(+Counter(log.bytes)),  # a receiver has calls, and sends nothing
        predicted=None if predicted is None else dict(predicted),
        weight_bytes=sum(local_bytes(p) for p in method.model.parameters()) if method.model else 0,
        predicted_weight_bytes=method.predicted_weight_bytes(),
        activation_bytes=growth,
        idle_ranks=method.idle_ranks,
        bubble=method.bubble,
        output_sha256=None if logits is None else digest_of(logits),
        between=log.between(hosts()),
        predicted_between=_predicted_between(method, routes, hosts()) if dist.get_rank() == 0 else None,
    )


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bits, dtype and shape."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _predicted_between(method: Method, routes: list[Tensor], found: Hosts) -> dict[str, dict[str, Pairs]] | None:
    """What crosses hosts as the ranks are placed, and as they would be otherwise."""
    if not found.several:
        return None
    placed = {found.placement: list(found.of)}
    for placement in (INSIDE, ACROSS):
        with suppress(PartitionError):
            placed.setdefault(placement, hosts_placed(placement, found.of, method.layout.grid.m))
    forms = {name: method.predicted_between(routes, of) for name, of in placed.items()}
    return {name: each for name, each in forms.items() if each is not None} or None


def _error(logits: Tensor | None, expected: Tensor | None) -> float | None:
    if logits is None or expected is None:
        return None
    return relative_error(logits.cpu(), expected.cpu())


def local_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter that this rank holds."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()
