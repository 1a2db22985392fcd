"""`python -m helix checkpoint export|import|verify`: its options, and what it prints. Starts without torch."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from helix.checkpoint.content import CheckpointError
from helix.checkpoint.manifest import CheckpointWarning, checkpoints, verify
from helix.command.sentences import complain


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="what", required=True, metavar="{export,import,verify}")
    file, made = ("file", "FILE.safetensors"), ("checkpoint", "the new checkpoint's folder")
    for action, text, arguments in (
        (
            "export",
            "write a checkpoint's weights, whole, to one file",
            (("checkpoint", "a checkpoint, or a folder of them (its newest whole one)"), file),
        ),
        ("import", "make a checkpoint, for any grid, of one file", (file, made)),
        (
            "verify",
            "check every file of a checkpoint against its checksum",
            (("checkpoint", "a checkpoint, or a folder of them (each one)"),),
        ),
    ):
        sub = actions.add_parser(action, help=text)
        for name, meaning in arguments:
            sub.add_argument(name, type=Path, help=meaning, metavar=name.upper())


def run(options: argparse.Namespace) -> None:
    """Do what was asked for.

    Raises:
        CheckpointError: in one sentence.
    """
    source = options.file if options.what == "import" else options.checkpoint
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    if options.what == "verify":
        _verify(source)
        return
    from helix.checkpoint import portable  # brings torch

    if options.what == "export":
        with warnings.catch_warnings(record=True) as refused:
            warnings.simplefilter("always", CheckpointWarning)
            nbytes = portable.export(options.checkpoint, options.file)
        for each in refused:
            complain(str(each.message), "warning")
        print(f"exported {options.checkpoint} to {options.file}: {nbytes / 1e6:.1f} MB")
    else:
        nbytes = portable.import_(options.file, options.checkpoint)
        print(f"imported {options.file} as {options.checkpoint}: {nbytes / 1e6:.1f} MB")


def _verify(source: Path) -> None:
    """Check a checkpoint, or each one of a folder of them; a line on each."""
    damaged = False
    for path in checkpoints(source) or [source]:
        try:
            manifest = verify(path)
        except CheckpointError as error:
            damaged = True
            complain(str(error))
        else:
            print(f"{path} is whole: {len(manifest.tensors)} tensors, {manifest.nbytes / 1e6:.1f} MB")
    if damaged:
        raise SystemExit(2)
