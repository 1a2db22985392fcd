"""The network interface by which a host reaches the others, which gloo is told.

Left to itself gloo takes the address that the host's own name stands for. That is 127.0.1.1 on a Debian as it is
installed, to which no other host can connect, and any one of a host's networks where it has several.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Sequence

import psutil
import torch.distributed as dist

from helix.config.schema import ConfigError

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface(store: dist.Store, number: int, hosts: Sequence[int]) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface that leads to the other hosts, unless it is set; all ranks call it.

    Every process says by which address of its own it reaches the launcher's store, which is on process 0's host. There
    that may be any address, so it takes the way to another host's. A loopback address, as that host may have of
    itself, is no way to another, unless there are none but such: hosts that are containers with one network.

    Args:
        store: in which the processes meet; its keys must be this start's own.
        number: the launcher's number of this process.
        hosts: the host of each process, as an index.

    Raises:
        ConfigError: on every rank, if GLOO_SOCKET_IFNAME names on one host what is none of its interfaces.
    """
    first_of = {host: hosts.index(host) for host in dict.fromkeys(hosts)}
    if len(first_of) == 1:
        return
    store.set(f"reached/{number}", json.dumps(_reached()))
    answers = {host: json.loads(store.get(f"reached/{first}")) for host, first in first_of.items()}
    if refusals := [answer["refusal"] for answer in answers.values() if answer["refusal"]]:
        raise ConfigError(refusals[0])
    if VARIABLE in os.environ:
        return
    others = [answer["address"] for host, answer in answers.items() if host != hosts[number] and answer["address"]]
    ways = [_own_address(each) for each in sorted(others, key=_is_loopback)]
    if hosts[number] != hosts[0]:  # not the store's
        ways.insert(0, answers[hosts[number]]["address"])
    own = min(filter(None, ways), key=_is_loopback, default=None)
    if own is not None and (name := _interfaces().get(own)) is not None:
        os.environ[VARIABLE] = name


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _reached() -> dict[str, str | None]:
    """By which of its addresses this host reaches the launcher's, and what is wrong with the interface it was told."""
    asked, names = os.environ.get(VARIABLE), sorted(set(_interfaces().values()))
    if asked is not None and asked not in names:
        refusal = f"{VARIABLE}={asked} is no network interface of {socket.gethostname()}; it has {', '.join(names)}"
        return {"address": None, "refusal": refusal}
    return {"address": _own_address(os.environ["MASTER_ADDR"]), "refusal": None}


def _own_address(other: str) -> str | None:
    """This host's address on the way to another; nothing is sent. None if there is no way."""
    try:
        found = socket.getaddrinfo(other, 1, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as end:
            try:
                end.connect(address)
            except OSError:
                continue
            return str(end.getsockname()[0])
    return None


def _interfaces() -> dict[str, str]:
    """The name of this host's interface with each of its addresses."""
    kinds = (socket.AF_INET, socket.AF_INET6)
    every = psutil.net_if_addrs()
    return {at.address.partition("%")[0]: name for name, each in every.items() for at in each if at.family in kinds}
