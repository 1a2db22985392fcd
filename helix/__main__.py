"""`python -m helix bench attention` and `python -m helix bench model`; the options, checked without torch.

Exit codes as in `helix.config.cli`: 0 done, 1 failed while running, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from helix.config import environment
from helix.config.schema import ConfigError
from helix.partition.grid import Grid, HeadLayout, PartitionError
from helix.partition.schedules import SCHEDULES, check_schedule, legal_schedules
from helix.partition.shape import TransformerShape

PEERS = ("plain", "sequence")


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
    from helix.study.bench import bench_attention, bench_model  # brings torch

    try:
        {"attention": bench_attention, "model": bench_model}[options.what](options)
    except KeyboardInterrupt:
        _stop("interrupted", code=130)


def _stop(reason: str, code: int) -> NoReturn:
    print(f"python -m helix: error: {' '.join(reason.split())}", file=sys.stderr)
    raise SystemExit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m helix", description=__doc__.split(";")[0].replace("`", ""))
    commands = parser.add_subparsers(dest="command", required=True, metavar="bench")
    bench = commands.add_parser("bench", help="measure alternatives side by side, alternating in one launch")
    benches = bench.add_subparsers(dest="what", required=True, metavar="{attention,model}")
    attention = benches.add_parser(
        "attention", help="every legal schedule on the attention layer", formatter_class=_Defaults
    )
    _add_sizes(attention, batch=4, length=256, rounds=15)
    attention.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="which; default every legal one")
    attention.add_argument(
        "--layer", action="store_true", help="the whole layer with its projections, not the core attention alone"
    )
    attention.add_argument("--no-causal", dest="causal", action="store_false", help="every query sees every key")
    model = benches.add_parser(
        "model", help="the whole model against PyTorch's tensor parallelism", formatter_class=_Defaults
    )
    _add_sizes(model, batch=8, length=256, rounds=8)
    model.add_argument("--layers", type=_count, default=4, help="blocks")
    model.add_argument("--mlp", type=_count, default=2048, help="MLP width")
    model.add_argument("--vocab", type=_count, default=256, help="vocabulary")
    model.add_argument("--schedule", choices=["auto", *SCHEDULES], default="auto", help="Helix's schedule")
    model.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="PyTorch's residual stream: "
                       "replicated (plain) or cut over the sequence")  # fmt: skip
    return parser


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    pass


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
    layout = HeadLayout(options.heads, options.kv_heads, options.head_dim)
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)
    for schedule in options.schedules or ():
        check_schedule(schedule, layout, grid, options.batch, options.length)
    options.schedules = options.schedules or legal_schedules(layout, grid, options.batch, options.length)
    if "perslice" not in options.schedules:
        options.schedules = ["perslice", *options.schedules]  # what the ratios are to


def _check_model(options: argparse.Namespace, grid: Grid) -> None:
    from helix.partition.tensor_parallel import check_tensor_parallel

    shape = model_shape(options)
    layout = shape.layout
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)
    check_schedule(options.schedule, layout, grid, options.batch, options.length)
    check_tensor_parallel(shape, grid.ranks)


def model_shape(options: argparse.Namespace) -> TransformerShape:
    return TransformerShape(
        options.layers, options.width, options.heads, options.kv_heads, options.head_dim, options.mlp, options.vocab
    )


if __name__ == "__main__":
    main()
