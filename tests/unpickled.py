"""A script of Helix's, run as it is but for a record of every class or function that a pickle names to be called.

`python tests/unpickled.py RECORD SCRIPT ..` appends a line to RECORD for each, with where it came from. Python's
audit hooks cannot be removed, nor passed by: forked ranks have them, and so has what C code unpickles.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# Between the processes of one job: torch's collectives of objects, what forked ranks give back to their launcher.
OWN = (
    "torch/distributed/distributed_c10d.py:_tensor_to_object",
    "multiprocessing/queues.py:get",
    "helix/ranks/fork.py:_keep",
    "helix/ranks/fork.py:_first_raised",
)


def watch(record: Path) -> None:
    """From here on, in this process and those that it forks."""
    out = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(what: str) -> None:
        frame, files = sys._getframe(2), []
        while frame is not None:
            files.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
            frame = frame.f_back
        kind = "own" if any(file.endswith(OWN) for file in files) else "foreign"
        os.write(out, f"{kind} {what} {' '.join(files)}\n".encode())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            note(".".join(map(str, arguments)))

    def load(*arguments: Any, **options: Any) -> Any:
        note("torch.load")
        return torch_load(*arguments, **options)

    torch_load, torch.load = torch.load, load
    sys.addaudithook(hook)


if __name__ == "__main__":
    _, record, script, *rest = sys.argv
    watch(Path(record))
    sys.path[0], sys.argv = str(ROOT), [script, *rest]
    runpy.run_path(str(ROOT / script), run_name="__main__")
