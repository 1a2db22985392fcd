"""`python -m helix claims`: the ledger's table, one claim in full, its check, and README's section."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from helix.config.schema import ConfigError

if TYPE_CHECKING:
    from helix.claims.ledger import Ledger

LEDGER = Path("paper/claims.yaml")
_VERDICTS = ("reproduced", "not-reproduced", "inconsistent", "not-testable")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ledger",
        type=Path,
        default=LEDGER,
        metavar="PATH",
        help=f"another ledger than {LEDGER}; it names files from the folder above its own",
    )
    parser.add_argument("--verdict", choices=_VERDICTS, help="claims of one verdict")
    parser.add_argument("--paper", metavar="ID", help="claims of one paper: full, concise or keypoints")
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--id", metavar="ID", help="one claim in full, with its arithmetic and evidence, instead")
    told.add_argument("--check", action="store_true", help="hold every claim against its files, tests and arithmetic")
    told.add_argument("--markdown", action="store_true", help="print README's section")
    told.add_argument(
        "--update",
        type=Path,
        metavar="FILE",
        help="write into FILE, README.md or docs/claims.md, what is between its markers",
    )


def run(options: argparse.Namespace) -> None:
    """Show, check or write what was asked for.

    Raises:
        ConfigError: in one sentence, before anything is written.
        RuntimeError: if the ledger does not hold.
    """
    from rich.console import Console

    instead = [name for name in ("id", "check", "markdown", "update") if getattr(options, name) not in (None, False)]
    filters = [name for name in ("verdict", "paper") if getattr(options, name) is not None]
    if instead and filters:
        raise ConfigError(f"--{filters[0]} chooses rows of the table, and --{instead[0]} shows none; give one of them")
    if options.check:
        _check(options.ledger)
        return

    from helix.claims import ledger, table

    claims = ledger.read(options.ledger)
    if options.id is not None:
        Console().print(table.render_one(claims, options.id))
    elif options.markdown:
        from helix.claims.markdown import markdown

        print(markdown(claims))
    elif options.update is not None:
        _update(claims, options.update)
    else:
        if options.paper not in (None, *claims.papers):
            raise ConfigError(f"--paper {options.paper} is none of: {', '.join(claims.papers)}")
        verdict = dict(zip(_VERDICTS, ledger.VERDICTS, strict=True)).get(options.verdict)
        Console().print(table.render(claims, verdict, options.paper))


def _check(path: Path) -> None:
    """Print every fault.

    Raises:
        RuntimeError: if there are any.
    """
    from helix.claims import ledger
    from helix.claims.faults import faults

    try:
        claims = ledger.read(path)
        found = faults(claims)
    except ledger.LedgerError as error:
        found = list(error.faults)
    for fault in found:
        print(fault)
    if found:
        raise RuntimeError(f"{path} has {len(found)} fault{'s' if len(found) > 1 else ''}, listed above")
    checks = sum(claim.check is not None for claim in claims.claims)
    print(
        f"{len(claims.claims)} claims hold: their files, tests and figures are there, and {checks} sums come out so."
    )


def _update(claims: Ledger, path: Path) -> None:
    from helix.claims.markdown import update
    from helix.study.report import write_whole

    if not path.is_file():
        raise ConfigError(f"--update {path}: there is no such file")
    write_whole(update(claims, path.read_text(), path), path)
