"""gloo is told the network interface that leads to the other hosts, and what a host lacks is refused on every rank."""

from __future__ import annotations

import json
import os
import socket
from socket import AF_INET as INET

import psutil
import pytest
import torch.distributed as dist

from helix.config.schema import ConfigError
from helix.ranks.interface import VARIABLE, choose_interface

# This host's interfaces by their IPv4 addresses.
OWN = {at.address: name for name, all_of in psutil.net_if_addrs().items() for at in all_of if at.family == INET}


@pytest.fixture(autouse=True)
def _untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that what is set meanwhile is undone
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def other_says(address: str | None, refusal: str | None = None) -> dist.Store:
    """The launcher's store, in which the process of another host, number 1, has said how it reached it."""
    return others_say({1: address}, refusal)


def others_say(addresses: dict[int, str | None], refusal: str | None = None) -> dist.Store:
    """The same of several processes, by their numbers."""
    store = dist.HashStore()
    for number, address in addresses.items():
        store.set(f"reached/{number}", json.dumps({"address": address, "refusal": refusal}))
    return store


@pytest.mark.parametrize("address", OWN)
def test_it_is_the_one_on_the_way_to_the_other_host(address: str) -> None:
    choose_interface(other_says(address), 0, [0, 1])
    assert os.environ[VARIABLE] == OWN[address]


def test_a_process_says_by_which_address_it_reached_the_launchers_store() -> None:
    store = other_says("127.0.0.1")
    choose_interface(store, 0, [0, 1])
    assert json.loads(store.get("reached/0")) == {"address": "127.0.0.1", "refusal": None}


@pytest.mark.parametrize("address", [each for each in OWN if not each.startswith("127.")])
def test_a_loopback_address_of_the_stores_host_is_no_way_to_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where that host's own name stands for 127.0.1.1; this process is of the second of three hosts."""
    monkeypatch.setenv("MASTER_ADDR", address)
    choose_interface(others_say({0: "127.0.0.1", 2: None}), 1, [0, 1, 2])
    assert os.environ[VARIABLE] == OWN[address]


def test_the_stores_host_takes_a_way_that_is_no_loopback() -> None:
    address = next((each for each in OWN if not each.startswith("127.")), "127.0.0.1")
    choose_interface(others_say({1: "127.0.0.1", 2: address}), 0, [0, 1, 2])
    assert os.environ[VARIABLE] == OWN[address]


def test_what_is_set_stays() -> None:
    name = next(iter(OWN.values()))
    os.environ[VARIABLE] = name
    choose_interface(other_says(next(reversed(OWN))), 0, [0, 1])
    assert os.environ[VARIABLE] == name


def test_without_a_way_gloo_chooses_by_itself() -> None:
    choose_interface(other_says(None), 0, [0, 1])
    assert VARIABLE not in os.environ


def test_processes_of_one_host_ask_nothing() -> None:
    choose_interface(dist.HashStore(), 0, [0, 0])
    assert VARIABLE not in os.environ


def test_an_interface_that_a_host_lacks_is_refused_on_every_rank() -> None:
    with pytest.raises(ConfigError, match=r"^on the other host$"):
        choose_interface(other_says(None, refusal="on the other host"), 0, [0, 1])
    os.environ[VARIABLE] = "ib7"
    with pytest.raises(ConfigError) as here:
        choose_interface(other_says("127.0.0.1"), 0, [0, 1])
    said, _, names = str(here.value).partition("; it has ")
    assert said == f"GLOO_SOCKET_IFNAME=ib7 is no network interface of {socket.gethostname()}"
    assert set(OWN.values()) <= set(names.split(", "))
