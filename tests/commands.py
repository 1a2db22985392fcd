"""Command lines in processes of their own, that need not import torch again.

A server, one for each pytest process that asks for it, has imported what the commands import, and forks for each
command line. The fork becomes the command: a session, streams, folder, environment and `sys.argv` of its own, the
script run as `__main__`, and the interpreter's whole end, with tracebacks and exit codes and what atexit does. What
it cannot show is how long imports take and what is imported when: those tests start an interpreter.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "deepspeed",
    "helix.generation.run",
    "helix.study.bench",
    "helix.study.inference",
    "helix.study.sweep",
    "helix.training.run",
    "pandas",
    "transformers.models.llama.modeling_llama",
    "wandb",
)


class Command:
    """A command line that runs, with those methods of `subprocess.Popen` that tests need; it writes to files.

    Args:
        arguments: as they would follow `python`: a script or `-m` and a module, and what is for it.
        cwd: the folder to run in.
        env: variables that it has besides, or with other values.
    """

    def __init__(self, *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  closed when it has ended
        self._status, status = os.pipe()
        request = {"arguments": arguments, "cwd": str(cwd), "env": {**os.environ, **(env or {})}}
        control, _ = _server()
        socket.send_fds(control, [json.dumps(request).encode()], [*(file.fileno() for file in self._files), status])
        os.close(status)
        self.returncode: int | None = None
        self.pid = int.from_bytes(os.read(self._status, 4), "big")
        assert self.pid, "there is no server"

    def read(self) -> tuple[str, str]:
        """What it has written on standard output and standard error, so far."""
        if self.returncode is None:
            # From the start, by a call that leaves alone where the process goes on to write.
            self._said = [os.pread(each.fileno(), os.fstat(each.fileno()).st_size, 0).decode() for each in self._files]
        out, err = self._said
        return out, err

    def wait(self, timeout: float = 60) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.read()
            self.returncode = int.from_bytes(os.read(self._status, 4), "big", signed=True)
            os.close(self._status)
            for file in self._files:
                file.close()
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        self.wait(timeout)
        return self.read()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The way to a server of this process's, which ends with it, and the server."""
    own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, __file__, str(its.fileno())]
        return own, subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()])


def serve(control: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request until there are no more; returns in the forks, each with its request and streams."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collections, the one at its end above all, would visit all that was imported: 2 s each
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 2**20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        reap()
    # The command's parent waits for it here, so that the server need not.
    control.close()
    *streams, status = descriptors
    pid = os.fork()
    if pid == 0:
        os.close(status)
        return json.loads(message), streams
    for descriptor in streams:
        os.close(descriptor)
    os.write(status, pid.to_bytes(4, "big"))
    os.write(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]).to_bytes(4, "big", signed=True))
    os._exit(0)


def reap() -> None:
    """Let go of the forks that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def become(request: dict, streams: list[int]) -> None:
    """Turn this process into the command."""
    os.setsid()
    for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # the server's, by its own TMPDIR
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = request["arguments"]
    if first == "-m":
        sys.path[0], sys.argv = request["cwd"], rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))
