"""Executes the notebooks from scratch: python notebooks/execute.py --runs FOLDER --to FOLDER, or --stored

`make notebooks` gives it runs of today, and keeps the executed copies; `make notebooks-stored` executes the stored
ones in place, on notebooks/data. Whatever differs from one execution to the next and says nothing (times, random
ids of widgets) is taken out, so that a stored notebook differs from its last version where its figures do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from helix.study.report import write_whole

HERE = Path(__file__).resolve().parent
LIMIT_S = 180  # of a notebook, which takes 5 to 20 s on two cores
_RANDOM_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")


def execute(path: Path, to: Path) -> str | None:
    """Execute one notebook in its own folder, and write it to `to`, as far as it came; in its own place only whole.

    Returns:
        what went wrong, or None.
    """
    notebook = nbformat.read(path, as_version=4)
    deadline = time.monotonic() + LIMIT_S
    here = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(
        notebook,
        timeout_func=lambda cell: max(1.0, deadline - time.monotonic()),
        kernel_name="python3",
        record_timing=False,
        extra_arguments=[
            "--log-level=ERROR"
        ],  # of every kernel on this machine it would warn that TCP is not encrypted
        resources=here,
    )
    fault = None
    try:
        client.execute()
    except CellExecutionError as error:
        fault = str(error).strip()
    except (CellTimeoutError, DeadKernelError) as error:
        fault = f"{type(error).__name__}: {error} ({LIMIT_S} s is the limit of a notebook)"
    fault = fault or warned(notebook)
    if fault is None or to != path:
        write_whole(nbformat.writes(settle(notebook)) + "\n", to)
    return fault


def warned(notebook: nbformat.NotebookNode) -> str | None:
    """What cells said on stderr: a warning that a reader would have to explain away."""
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    said = [
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    return f"on stderr: {''.join(said).strip()}" if said else None


def settle(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what differs from one execution to the next: widgets get numbers for ids; addresses and times go."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
    # Numbered in the order in which they were made; `writes` would sort them, and so deal the numbers at random.
    ids = list(dict.fromkeys(_RANDOM_ID.findall(json.dumps(notebook))))
    text = _ADDRESS.sub(">", nbformat.writes(notebook))
    numbers = {random: f"{number:032x}" for number, random in enumerate(ids, 1)}
    return nbformat.reads(_RANDOM_ID.sub(lambda found: numbers[found[0]], text), as_version=4)


def main() -> int:
    """Execute all, or those that were named, and say in a line each how long it took and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help="notebooks by the start of their names, such as 03; all without"
    )
    parser.add_argument("--runs", type=Path, default=HERE / "data", help="the runs that they read")
    parser.add_argument("--to", type=Path, help="where the executed copies go")
    parser.add_argument(
        "--stored", action="store_true", help="execute those in notebooks/ in place"
    )
    asked = parser.parse_args()
    if asked.stored == (asked.to is not None):
        parser.error("give --to FOLDER, or --stored")
    found = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in found if not asked.names or path.name.startswith(tuple(asked.names))]
    if not chosen:
        parser.error(
            f"no notebook begins with {' or '.join(asked.names)}; there are {[path.name for path in found]}"
        )
    os.environ["HELIX_NOTEBOOK_RUNS"] = str(asked.runs.resolve(strict=True))
    folder = HERE if asked.stored else asked.to
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in chosen:
        started = time.monotonic()
        fault = execute(path, folder / path.name)
        print(
            f"{'failed' if fault else 'passed'} {time.monotonic() - started:6.1f} s  {path.name}",
            flush=True,
        )
        if fault:
            print(fault, file=sys.stderr, flush=True)
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
