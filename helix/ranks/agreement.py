"""Whether all ranks that a launcher started were asked for the same, by the same code: before anything else is done.

Forked ranks cannot differ, and are not asked. Those of a launcher have a command line, an environment and, on several
hosts, an installation each; and a folder each, whose name has the second in which it was chosen: rank 0's is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

import helix
from helix.config.schema import ConfigError
from helix.flight import ring
from helix.flight.parting import ranks_in_words
from helix.ranks.fork import forked

LIMIT_S = 60.0  # ranks that start do so together, but for what reading the source and a slow disk take
_VARIABLES = ("HELIX_DEBUG", "HELIX_DEBUG_LIMIT_S", "HELIX_SHARED_MEMORY")
# Of a host, not of what is measured; and how a layout was chosen, which is there itself.
_OWN = ("hardware", "logger", "chosen")
_POLL_S = 0.01
_MOST = 3
_rounds = itertools.count()


def agree_on(settings: Mapping[str, Any], folder: Path | None = None) -> None:
    """Compare settings, versions, sources and Helix's environment variables of all ranks, which all call it.

    Args:
        settings: what was asked for, nested; hardware, logger and chosen are each host's own.
        folder: of the run, where the flight record is written if it fails from now on: rank 0's.

    Raises:
        ConfigError: on every rank, naming a rank that differs from rank 0, its host, what it is, and both values; or
            the ranks that have not come.
    """
    # None of an earlier job of this process: what ends here is not to be found there.
    ring.keep_in(folder)
    if not forked():
        agreed = compare(_fields(settings), LIMIT_S, "" if folder is None else str(folder.absolute()))
        ring.keep_in(Path(agreed) if agreed else None)


def compare(fields: Mapping[str, str], limit_s: float, folder: str = "") -> str:
    """As `agree_on`, of fields by name; returns rank 0's folder."""
    store = dist.PrefixStore(f"helix-agreement-{next(_rounds)}", _get_default_store())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store.set(str(rank), json.dumps([socket.gethostname(), dict(fields)]))
    if rank == 0:
        store.set("verdict", json.dumps([_verdict(store, ranks, limit_s), folder]))
    # Rank 0 gives up first, since it knows who is missing.
    if not _there(store, ["verdict"], limit_s + 5):
        raise ConfigError(f"rank 0 has not compared what rank {rank} was asked for within {limit_s + 5:.0f} s")
    verdict, agreed = json.loads(store.get("verdict"))
    if verdict:
        raise ConfigError(verdict)
    return str(agreed)


def _verdict(store: dist.Store, ranks: int, limit_s: float) -> str:
    if not _there(store, [str(rank) for rank in range(ranks)], limit_s):
        missing = [rank for rank in range(ranks) if not store.check([str(rank)])]
        verb, are = ("has", "it is") if len(missing) == 1 else ("have", "they are")
        return f"{ranks_in_words(missing)} {verb} not said within {limit_s:.0f} s what {are} asked for"
    host, first = json.loads(store.get("0"))
    for rank in range(1, ranks):
        own_host, own = json.loads(store.get(str(rank)))
        differ = [name for name in dict.fromkeys((*first, *own)) if first.get(name) != own.get(name)]
        if differ:
            pairs = [f"{name} is {own.get(name, 'nothing')} there, and {first.get(name, 'nothing')} on rank 0"
                     for name in differ[:_MOST]]  # fmt: skip
            more = f"; {len(differ) - _MOST} more differ" if len(differ) > _MOST else ""
            return (
                f"rank {rank} (host {own_host}) was not started as rank 0 (host {host}): {'; '.join(pairs)}{more}; "
                "give all hosts the same command, environment and installation"
            )
    return ""


def _there(store: dist.Store, keys: list[str], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _fields(settings: Mapping[str, Any]) -> dict[str, str]:
    kept = {key: value for key, value in settings.items() if key not in _OWN}
    return {
        **dict(_flat(kept, "")),
        **{name: os.environ.get(name, "not set") for name in _VARIABLES},
        "Helix's version": helix.__version__,
        "Helix's source": _source(),
        "torch's version": torch.__version__,
        "Python's version": platform.python_version(),
    }


def _flat(value: Any, name: str) -> list[tuple[str, str]]:
    """Nested settings by their keys on the command line."""
    if isinstance(value, Mapping):
        return [pair for key, each in value.items() for pair in _flat(each, f"{name}.{key}" if name else str(key))]
    return [(name, str(value))]


@cache
def _source() -> str:
    """Twelve hexadecimal digits of the package's files."""
    folder = Path(__file__).parent.parent
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return whole.hexdigest()[:12]
