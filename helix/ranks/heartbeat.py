"""Ranks that torchrun or SLURM started tell each other that they live, so that none waits for one that is gone.

Each rank has a thread, and a connection to rank 0's; on it goes, every two seconds and at each new phase, what the
rank is doing. Four things end the job, and rank 0 decides which was first:

    a connection closes        the rank's process has ended without a word, as by SIGKILL
    a rank was told to end     and this one was not
    nothing comes for 15 s     it is stopped, or its host is cut off from the network
    a rank says it has raised  what it raised

Then every rank knows the same sentence, one says it, and each ends at once, wherever its main thread is: inside a
collective, of gloo or of NCCL, no exception would reach it. Who loses rank 0 decides for itself: on both sides of a
network that was cut, all ranks end.

Not through the launcher's store: who asks it finds out every two seconds at best, and torchrun stops the ranks of a
host within a tenth of a second of one's death. That SIGTERM may be here before the closed connection is seen; so a
rank ends of it only after it has told the others, and if no lost rank is found to be behind it. Forked ranks are
watched by their launcher (`helix.ranks.fork`).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from helix.flight import activity, ring
from helix.ranks import failure
from helix.ranks.failure import RankError, end_agent
from helix.ranks.heartbeat_link import FIRST_BYTES, LINE_BYTES, Line, Peer, serve
from helix.ranks.hosts import first_of_host, hosts_of
from helix.ranks.signals import signals
from helix.ranks.verdict import BEAT_S, DOUBT_S, SILENT_S, Known

# How long after SIGTERM a lost rank may be found to be behind it; longer than others doubt (DOUBT_S) what it says.
_SETTLE_S = 0.6
# How long the others wait before they end, since the launcher then stops the one that still has something to say.
_GRACE_S = 1.0
_TICK_S = 0.25
# After Ctrl-C, how long the main thread gets to unwind by itself.
_UNWIND_S = 1.0
# How long a rank that is raising what ended the job has to say it, once torchrun stops it.
_SAY_S = 5.0
# Of ranks of this process that have raised: still needed until it ends, or goes on to a next launch.
_raised: list[ExitStack] = []


class Heartbeat:
    """This rank's thread, from when all ranks have come together until they part.

    Args:
        store: fresh keys that all ranks share.
        number: the launcher's, of this process.
        said: `helix.ranks.hosts.own_host` of every process.
    """

    def __init__(self, store: dist.Store, number: int, said: list[str]) -> None:
        self._number, self._said = number, said
        others, known = range(1, len(said)) if number == 0 else range(1), hosts_of(said)
        self._peers = [Peer(other, known.where(other), other) for other in others]
        self._known = Known(self._peers, first=number == 0)
        self._rank = number
        self._own: RankError | None = None
        self._decided, self._told = threading.Event(), False
        self._verdict: RankError | None = None
        self._leaving = False
        self._stopped, self._announced = threading.Event(), threading.Event()  # told to end; the others know
        self._selector = selectors.DefaultSelector()
        self._bell, self._woken = socket.socketpair()  # wakes the thread: a new phase, an error, the end
        self._bell.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._listen(store) if number == 0 else self._connect(store)
        self._thread = threading.Thread(target=self._run, name="helix-heartbeat", daemon=True)
        self._thread.start()
        activity.listen(self._wake)
        while _raised:
            _raised.pop().close()
        self._undo = ExitStack()
        self._undo.enter_context(failure.settled(self._settle))
        if threading.current_thread() is threading.main_thread():
            self._undo.enter_context(signals(self._on_signal))

    def place(self, positions: Sequence[int]) -> None:
        """From now on, call each process by its position on the mesh, which the launcher's number need not be."""
        self._rank = positions[self._number]
        for peer in self._peers:
            peer.rank = positions[peer.number]

    def leave(self) -> None:
        """Tell the others that this rank has done its work, and stop."""
        activity.listen(None)
        self._leaving = True
        self._wake()
        self._thread.join()
        self._undo.close()

    def blame(self, error: BaseException) -> None:
        """Tell the others what this rank raised; returns if it is to be raised, as no lost rank is behind it."""
        activity.listen(None)
        trace = "".join(traceback.format_exception(error))
        self._own = failure.raised(self._rank, activity.current(), error, trace)
        self._wake()
        self._decided.wait(SILENT_S)
        if self._verdict is not None and not self._verdict.trace:
            self._thread.join()  # it ends this process
        error.__cause__ = self._own  # whose trace has the error's own cause
        _raised.append(self._undo)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGINT:
            self._thread.join(_UNWIND_S)
            if not self._thread.is_alive():
                return
        failure.stop()
        if self._own is not None:
            time.sleep(_SAY_S)
        os._exit(128 + number)

    def _settle(self) -> None:
        """This process was told to stop: have the others know. Returns if no lost rank is found behind it."""
        self._stopped.set()
        self._wake()
        if self._thread.is_alive() and self._announced.wait(_GRACE_S):
            self._decided.wait(_SETTLE_S)
        if self._verdict is not None:
            self._thread.join()

    def _listen(self, store: dist.Store) -> None:
        self._token = uuid4().hex
        self._server, address = serve(len(self._said), alone=len(set(self._said)) == 1)
        self._selector.register(self._server, selectors.EVENT_READ)
        store.set("heartbeat", json.dumps([*address, self._token]))

    def _connect(self, store: dist.Store) -> None:
        address, port, token = json.loads(store.get("heartbeat"))
        line = Line(socket.create_connection((address, port), timeout=SILENT_S))
        line.send({"token": token, "number": self._number})
        self._peers[0].line = line
        self._selector.register(line, selectors.EVENT_READ, self._peers[0])

    def _wake(self) -> None:
        with suppress(OSError):
            self._bell.send(b"!")

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # a rank that fell silent for that would be taken for a lost one
            words = f"rank {self._rank} goes on unwatched: its heartbeat failed ({type(error).__name__}: {error})"
            print(words, file=sys.stderr, flush=True)
            self._say({"bye": True})
        self._close()

    def _watch(self) -> None:
        before, beaten = time.monotonic(), 0.0
        while not self._leaving:
            now = time.monotonic()
            for peer in self._peers:
                # Time in which this process was stopped as well (Ctrl-Z and `fg`, a debugger) is nobody's silence.
                peer.silent_s += min(now - before, 2 * _TICK_S)
            before = now
            if now - beaten >= BEAT_S:
                beaten = now
                self._say(state := self._state())
                if "stopped" in state:
                    self._announced.set()
            told = any(each.stopped_at for each in self._peers)
            for key, _ in self._selector.select(DOUBT_S / 10 if told else _TICK_S):
                if key.fileobj is self._woken:
                    self._woken.recv(64)
                    beaten = 0.0
                else:
                    self._hear(key)
            if self._own is not None and self._own not in self._known.raised:
                self._known.raised.insert(0, self._own)  # what all raise alike, rank 0 says
            if (found := self._verdict or self._known.verdict(self._stopped.is_set())) is not None:
                self._end(found)
                return
        self._say({"bye": True})

    def _state(self) -> dict[str, Any]:
        state = {"pid": os.getpid(), "phase": activity.current(), "last": ring.last()}
        state |= {} if self._own is None else {"raised": self._own.short()}
        return state | ({"stopped": True} if self._stopped.is_set() else {})

    def _say(self, words: dict[str, Any]) -> None:
        for peer in self._peers:
            if peer.line is not None:
                peer.line.send(words)

    def _hear(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is getattr(self, "_server", None):
            link, _ = self._server.accept()
            if len(self._selector.get_map()) < 2 * len(self._said) + 8:
                self._selector.register(Line(link, FIRST_BYTES), selectors.EVENT_READ)
            else:  # strangers
                link.close()
            return
        line, peer = key.fileobj, key.data
        assert isinstance(line, Line)
        said = line.read()
        if said is None:
            self._refuse(line)
            if peer is not None and not peer.parted:
                self._known.closed.append(peer)
            return
        for words in said:
            peer = peer or self._introduced(line, words)
            if peer is None:
                self._refuse(line)
                return
            self._note(peer, words)

    def _refuse(self, line: Line) -> None:
        self._selector.unregister(line)
        line.link.close()

    def _introduced(self, line: Line, words: dict[str, Any]) -> Peer | None:
        """The rank whose first line this is; None if it is a stranger's."""
        number = words.get("number")
        if words.get("token") != self._token or not isinstance(number, int) or not 0 < number < len(self._said):
            return None
        peer = self._peers[number - 1]
        peer.line, line.most = line, LINE_BYTES
        self._selector.modify(line, selectors.EVENT_READ, peer)
        return peer

    def _note(self, peer: Peer, words: dict[str, Any]) -> None:
        peer.silent_s = 0.0
        for name in ("pid", "phase", "last"):
            setattr(peer, name, words.get(name, getattr(peer, name)))
        peer.parted = peer.parted or "bye" in words
        if "stopped" in words and not peer.stopped_at:
            peer.stopped_at = time.monotonic()
        if "raised" in words:
            self._known.note_raised(RankError(*words["raised"]))
        if "verdict" in words:
            self._verdict, self._told = RankError(*words["verdict"]), True
            self._kill(words.get("silent", []))

    def _end(self, verdict: RankError) -> None:
        """End this process, unless its main thread is raising what says the same."""
        self._verdict, silent = verdict, [(each.number, each.pid) for each in self._known.silent()]
        if self._number == 0:
            self._say({"verdict": verdict.short(), "silent": silent})
        self._decided.set()
        if self._own is not None and verdict.trace:
            return
        self._kill(silent)
        failure.tell(verdict, speaks := self._speaks())
        if not speaks:
            self._stopped.wait(_GRACE_S)
        elif self._said[0] != self._said[self._number]:
            end_agent()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(1)

    def _speaks(self) -> bool:
        """Whether this rank says it: rank 0, or the first of each host that has lost rank 0."""
        if self._number == 0:
            return True
        return not self._told and first_of_host(self._said[1:], self._number - 1)  # rank 0 aside

    def _kill(self, silent: Iterable[Sequence[int]]) -> None:
        """A stopped rank of this host, by number and process, would outlive torchrun's SIGTERM by 30 s."""
        for number, pid in silent:
            with suppress(OSError):
                if pid and self._said[number] == self._said[self._number]:
                    os.kill(pid, signal.SIGKILL)

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            each: Any = key.fileobj
            (each.link if isinstance(each, Line) else each).close()
        self._selector.close()
        self._bell.close()
