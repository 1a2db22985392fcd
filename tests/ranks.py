"""Running a test's function on ranks, one line at each call site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from helix.ranks.launch import launch

T = TypeVar("T")


def on_ranks(ranks: int, fn: Callable[..., T], *args: Any, timeout_s: float = 20) -> list[T]:
    """`fn(*args)` on `ranks` gloo ranks; each one's result, by rank.

    A wrong collective then fails within `timeout_s` seconds, not within gloo's 30 minutes. What needs autograd
    belongs in here too, on one rank if need be: where a GPU is present, a backward pass in the pytest process
    starts threads that no later fork survives.
    """

    def on_one_thread(*args: Any) -> T:
        torch.set_num_threads(1)  # tests are small; where cores are shared, a second thread is mostly waited for
        return fn(*args)

    return launch(on_one_thread, *args, ranks=ranks, timeout_s=timeout_s)
