"""One answer for all ranks: what one of them cannot read or write, every rank learns, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from helix.checkpoint.content import CheckpointError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_rank_0(fn: Callable[[], T]) -> T:
    """What `fn` returns on rank 0, on every rank; how it fails there as one sentence, on every rank."""
    answer: list[Any] = [None, None]
    cause = None
    if rank() == 0:
        try:
            answer[0] = fn()
        except Exception as error:  # whatever it is, the others must not wait
            answer[1], cause = sentence(error), error
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise CheckpointError(answer[1]) from cause
    value: T = answer[0]
    return value


def together(fn: Callable[[], T]) -> T:
    """`fn()` on every rank; if it fails on any, the first such rank's reason on all, so that none waits."""
    result, reason, cause = None, None, None
    try:
        result = fn()
    except Exception as error:
        reason, cause = sentence(error), error
    reasons = [reason]
    if dist.is_initialized():
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    for each in reasons:
        if each is not None:
            raise CheckpointError(each) from cause
    return result  # type: ignore[return-value]


def joined(lists: list[list[str]]) -> list[list[str]]:
    """Each list with what it has on other ranks, once, the first rank's first."""
    everyones: list[list[list[str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, lists)
    return [list(dict.fromkeys(name for own in owns for name in own)) for owns in zip(*everyones, strict=True)]


def told(fn: Callable[[], T], checkpoint: Path) -> T:
    """`fn()`, with DCP's report of every rank's traceback as one sentence: the first rank's."""
    try:
        return fn()
    except CheckpointException as failed:
        first, (error, _) = min(failed.failures.items())
        if isinstance(error, CheckpointError):
            raise error from None
        raise CheckpointError(f"{checkpoint} failed on rank {first}: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
