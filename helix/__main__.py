"""`python -m helix bench attention` and `python -m helix bench model`; the options, checked without torch.

Exit codes as in `helix.config.cli`: 0 done, 1 failed while running, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from helix.config import environment
from helix.config.schema import ConfigError
from helix.partition.grid import Grid, HeadLayout, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.schedules import EXACT, SCHEDULES, check_schedule, legal_schedules
from helix.partition.shape import TransformerShape

PEERS = ("plain", "sequence", "helix")


class _Parser(argparse.ArgumentParser):
    """Errors of one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        _stop(f"{message} (--help lists the options)", code=2)


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    try:
        _check(options)
    except (PartitionError, ConfigError) as error:
        _stop(str(error), code=2)
    try:
        _run(options)
    except KeyboardInterrupt:
        _stop("interrupted", code=130)
    except RuntimeError as error:
        _stop(str(error), code=1)


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from helix.study import bench  # brings torch

    grid, rounds = Grid(options.m, options.n), bench.Rounds(options.rounds, options.warmup, options.seed)
    if options.what == "attention":
        case = bench.AttentionCase(
            _layout(options),
            grid,
            options.batch,
            options.length,
            options.causal,
            options.width,
            options.layer,
            options.residual,
        )
        result = bench.bench_attention(case, options.schedules, rounds)
    else:
        layers = AttentionOptions(schedule=options.schedule, residual=options.residual)
        result = bench.bench_model(
            bench.ModelCase(_shape(options), grid, layers, options.batch, options.length, tuple(options.peers)), rounds
        )
    Console().print(result.table())
    if options.json is not None:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps(result.as_dict() | {"settings": settings}, indent=2) + "\n")


def _stop(reason: str, code: int) -> NoReturn:
    print(f"python -m helix: error: {' '.join(reason.split())}", file=sys.stderr)
    raise SystemExit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m helix", description=__doc__.split(";")[0].replace("`", ""))
    commands = parser.add_subparsers(dest="command", required=True, metavar="bench")
    bench = commands.add_parser("bench", help="measure alternatives side by side, alternating in one launch")
    benches = bench.add_subparsers(dest="what", required=True, metavar="{attention,model}")
    attention = benches.add_parser(
        "attention",
        help="every legal schedule on the attention layer",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_sizes(attention, batch=4, length=256, rounds=15)
    attention.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="which; default every legal one")
    attention.add_argument(
        "--layer", action="store_true", help="the whole layer with its projections, not the core attention alone"
    )
    attention.add_argument("--no-causal", dest="causal", action="store_false", help="every query sees every key")
    model = benches.add_parser(
        "model",
        help="the whole model against PyTorch's tensor parallelism",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_sizes(model, batch=8, length=256, rounds=8)
    model.add_argument("--layers", type=_count, default=4, help="blocks")
    model.add_argument("--mlp", type=_count, default=2048, help="MLP width")
    model.add_argument("--vocab", type=_count, default=256, help="vocabulary")
    model.add_argument("--schedule", choices=["auto", *EXACT], default="auto", help="Helix's schedule")
    model.add_argument("--peers", nargs="+", choices=PEERS, default=["plain", "sequence"],
                       help="PyTorch's tensor parallelism with its residual stream on every rank (plain) or cut over "
                       "the sequence; or Helix itself on 1 x (m n) ranks")  # fmt: skip
    return parser


def _add_sizes(parser: argparse.ArgumentParser, batch: int, length: int, rounds: int) -> None:
    parser.add_argument("--m", type=_count, default=4, help="feature slices")
    parser.add_argument("--n", type=_count, default=4, help="head groups")
    parser.add_argument("--ranks", type=_count, help="must be m * n, and is if not given")
    parser.add_argument("--heads", type=_count, default=16, help="query heads")
    parser.add_argument("--kv-heads", type=_count, help="key/value heads; as many as heads if not given")
    parser.add_argument("--head-dim", type=_count, help="features of one head; default 64, or width / heads")
    parser.add_argument("--width", type=_count, help="model width; default 512 for model, heads * head_dim else")
    parser.add_argument("--batch", type=_count, default=batch, help="samples")
    parser.add_argument("--length", type=_count, default=length, help="tokens of one sample")
    parser.add_argument("--residual", choices=["sharded", "replicated"], default="sharded",
                        help="layout of Helix's residual stream")  # fmt: skip
    parser.add_argument("--rounds", type=_count, default=rounds, help="each runs every alternative twice")
    parser.add_argument("--warmup", type=_count, default=2, help="steps of each alternative before the first round")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return int(text)


def _check(options: argparse.Namespace) -> None:
    """Fill in what follows from other options, and refuse what cannot run.

    Raises:
        PartitionError, ConfigError: in one sentence.
    """
    options.kv_heads = options.kv_heads or options.heads
    if options.what == "model":
        options.width = options.width or 512
        if not options.head_dim and options.width % options.heads:
            raise ConfigError(f"--heads {options.heads} does not divide --width {options.width}; give --head-dim")
        options.head_dim = options.head_dim or options.width // options.heads
    else:
        options.head_dim = options.head_dim or 64
        options.width = options.width or options.heads * options.head_dim
    grid = Grid(options.m, options.n)
    options.ranks = options.ranks or grid.ranks
    if options.ranks != grid.ranks:
        raise ConfigError(f"--ranks {options.ranks} is not m*n = {grid.m}*{grid.n} = {grid.ranks}")
    if options.rounds < 2:
        raise ConfigError("an interval needs --rounds of at least 2, not 1")
    _check_machine(options)
    (_check_model if options.what == "model" else _check_attention)(options, grid)


def _check_machine(options: argparse.Namespace) -> None:
    started = environment.started()
    if started is not None:
        raise ConfigError(
            f"the bench forks its own ranks on one machine, whose clock they share; start it without {started.by}"
        )
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    if options.json is not None and options.json.is_dir():
        raise ConfigError(f"--json {options.json} is a folder; give a file's path")


def _check_attention(options: argparse.Namespace, grid: Grid) -> None:
    layout = _layout(options)
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)
    for schedule in options.schedules or ():
        check_schedule(schedule, layout, grid, options.batch, options.length)
    options.schedules = options.schedules or legal_schedules(layout, grid, options.batch, options.length)
    if "perslice" not in options.schedules:
        options.schedules = ["perslice", *options.schedules]  # what the ratios are to


def _check_model(options: argparse.Namespace, grid: Grid) -> None:
    shape = _shape(options)
    layout = shape.layout
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)
    check_schedule(options.schedule, layout, grid, options.batch, options.length)
    if not Grid(1, grid.ranks).fits(layout):
        raise ConfigError(
            f"the peers are tensor parallel over {grid.ranks} ranks, which needs whole heads on each: "
            f"{grid.ranks} divides not both --heads {shape.heads} and --kv-heads {shape.kv_heads}"
        )
    if "sequence" in options.peers and options.length % grid.ranks:
        raise ConfigError(
            f"the peer that cuts the sequence needs --length divisible by {grid.ranks} ranks, not {options.length}; "
            "or give --peers plain"
        )


def _layout(options: argparse.Namespace) -> HeadLayout:
    return HeadLayout(options.heads, options.kv_heads, options.head_dim)


def _shape(options: argparse.Namespace) -> TransformerShape:
    return TransformerShape(
        options.layers, options.width, options.heads, options.kv_heads, options.head_dim, options.mlp, options.vocab
    )


if __name__ == "__main__":
    main()
