"""A command line as far as it gets without torch, in a fork of the process that asks: a tenth of a second, not ten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

from commands import become

# What the commands import before torch; a fork has it already.
IMPORTED = (
    "helix.calibration.validate_command",
    "helix.certify.command",
    "helix.checkpoint.asked",
    "helix.command.cli",
    "helix.claims.command",
    "helix.generation.asked",
    "helix.pretrained.gguf_command",
    "helix.study.bench_command",
)
BEGINS = 77  # exit code of a fork that came to torch


class Light:
    """A command line in a fork of this process that ends where it would import torch; as `Command`."""

    def __init__(self, *arguments: str, cwd: Path, env: dict[str, str]) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  closed with this
        request = {"arguments": arguments, "cwd": str(cwd), "env": {**os.environ, **env}}
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            _become(request, [os.dup(file.fileno()) for file in self._files])

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            else:
                time.sleep(0.005)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def read(self) -> tuple[str, str]:
        out, err = (os.pread(each.fileno(), 2**24, 0).decode(errors="replace") for each in self._files)
        return out, err


class _NoTorch:
    """Ends the process at the import of torch, where a command has found nothing wrong."""

    def find_spec(self, name: str, *_: object) -> None:
        if name in ("torch", "gguf", "safetensors"):
            os._exit(BEGINS)


def _become(request: dict, streams: list[int]) -> NoReturn:
    """As an interpreter would run it, with its end."""
    sys.meta_path.insert(0, _NoTorch())  # type: ignore[arg-type]
    sys.argv = ["python"]
    code: object = 0
    try:
        become(request, streams)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
