"""SIGTERM and SIGINT told to a thread, wherever the main thread is.

That of a rank is, as a rule, blocked in C++ inside a collective, where Python runs no signal handler. But the C-level
handler does run, in whichever thread the kernel picks, and writes to the wakeup fd, where a thread waits. (`sigwait`
in a thread was rejected: it needs the signal blocked in every thread, those of gloo and W&B included, and W&B's own
process would inherit the block.)

Processes that are forked meanwhile (data loaders) share neither the thread nor its socket: a signal to one of them is
not a signal to this one.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ENDS_S = 5.0
# The wakeup fds' sockets, the innermost last. Handlers and wakeup fd are the process's, so these are too.
_watched: list[socket.socket] = []


@contextmanager
def signals(hear: Callable[[int], None]) -> Iterator[None]:
    """While inside, `hear` is called with the number of each SIGTERM and SIGINT, on a thread of its own.

    SIGTERM does nothing else; SIGINT reaches the main thread as well, if that is in Python. Of several, the innermost
    hears. Only from the main thread.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(receiver, hear), name="helix-signals", daemon=True)
    watcher.start()
    # A Python-level handler has to exist for the C-level one to be installed; SIGINT's does, as a rule.
    before = signal.signal(signal.SIGTERM, _leave_to_watcher)
    wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    _watched.append(sender)
    try:
        yield
    finally:
        _watched.remove(sender)
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(signal.SIGTERM, before)
        sender.close()  # the watcher reads the end of the stream, and returns
        watcher.join(_ENDS_S)
        receiver.close()


def _watch(receiver: socket.socket, hear: Callable[[int], None]) -> None:
    while numbers := receiver.recv(64):
        for number in numbers:
            if number in _SIGNALS:
                hear(number)


def _leave_to_watcher(signum: int, frame: FrameType | None) -> None:
    """Nothing: the wakeup fd has told the watcher."""


def _hold() -> None:
    """Before a fork: a signal that reached the child before `_disarm` would be told to the parent's watcher."""
    if _watched:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _release() -> None:
    if _watched:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _disarm() -> None:
    """In a forked child: have its signals do what they do in any process."""
    if _watched:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _release()
        _watched.clear()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_disarm)
