"""`python -m helix gguf`: its options. Starts without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from helix.pretrained import gguf


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="of llama.cpp, quantized or not", metavar="FILE.gguf")
    parser.add_argument("folder", type=Path, help="the new folder", metavar="FOLDER")
    parser.add_argument("--dtype", choices=gguf.DTYPES, default="float32", help="of the new weights")


def run(options: argparse.Namespace) -> None:
    """Make the folder.

    Raises:
        CheckpointError: in one sentence.
    """
    gguf.convert(options.file, options.folder, options.dtype)
