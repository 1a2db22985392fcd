"""Where forked ranks meet: a store that only this machine reaches.

Who reaches a store can write to it, and torch's collectives of Python objects unpickle what they get. Torch
elastic's own rendezvous of one machine listens on every interface, two stores of it: of `TCPStore` the host's name is
for the clients only. A store can be given a socket instead, and this one is bound to the loopback address.
"""

from __future__ import annotations

import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

LOOPBACK = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of one agent, which waits for nobody, and the store that it shares with its ranks.

    Args:
        run_id: a name of the launch; the agent's own keys are under it, apart from the ranks'.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id, self._closed = run_id, False
        with socket.create_server((LOOPBACK, 0)) as server:
            self._port: int = server.getsockname()[1]
            # The store owns the socket from here on, and closes it.
            self._store = TCPStore(
                LOOPBACK, self._port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
            )

    @property
    def use_agent_store(self) -> bool:
        """The ranks are clients of this store: a server of their own would again listen everywhere."""
        return True

    def get_backend(self) -> str:
        """A name for elastic's records."""
        return "loopback"

    def get_run_id(self) -> str:
        """The launch's name."""
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """One agent of one, at every start of its ranks."""
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        """Whether the launch is over."""
        return self._closed

    def set_closed(self) -> None:
        """The launch is over."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """No other machine ever joins."""
        return 0

    def shutdown(self) -> bool:
        """Close for good; the store ends with this object."""
        self._closed = True
        return True
