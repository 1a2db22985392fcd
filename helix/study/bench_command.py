"""`python -m helix bench attention|concat|checkpoint`: its options, checked without torch, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from helix.config import environment
from helix.config.schema import ConfigError
from helix.partition.grid import Grid, HeadLayout
from helix.partition.schedules import SCHEDULES, check_schedule, legal_schedules
from helix.partition.shape import TransformerShape
from helix.study.plan_command import check_file

if TYPE_CHECKING:
    from helix.study import bench, bench_checkpoint


def add_options(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="what", required=True, metavar="{attention,concat,checkpoint}")
    for name, text, add in (
        ("attention", "every legal schedule on the attention layer", _add_attention),
        ("concat", "the papers' hierarchical concatenation of attention outputs against a flat one", _add_sizes),
        (
            "checkpoint",
            "saving and loading a model with AdamW's state against writing and reading as many bytes",
            _add_checkpoint,
        ),
    ):
        add(benches.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter))


def run(options: argparse.Namespace) -> None:
    """Measure what was asked for, and print it.

    Raises:
        ConfigError, PartitionError: in one sentence, before anything is launched.
    """
    from rich.console import Console

    _check(options)
    result = _measured(options)
    Console().print(result.table())
    if options.json is not None:
        kept = {key: value for key, value in vars(options).items() if key != "json"}
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in kept.items()}
        options.json.write_text(json.dumps(result.as_dict() | {"settings": settings}, indent=2) + "\n")


def _measured(options: argparse.Namespace) -> bench.Comparison | bench_checkpoint.CheckpointComparison:
    from helix.study import bench, bench_checkpoint  # brings torch

    grid, rounds = Grid(options.m, options.n), bench.Rounds(options.rounds, options.warmup, options.seed)
    if options.what == "checkpoint":
        held = bench_checkpoint.CheckpointCase(_shape(options), grid, options.folder, options.background)
        return bench_checkpoint.bench_checkpoint(held, rounds)
    if options.what == "concat":
        outputs = bench.ConcatCase(options.heads, options.head_dim, grid, options.batch, options.length)
        return bench.bench_concat(outputs, rounds)
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
    return bench.bench_attention(case, options.schedules, rounds)


def _add_attention(attention: argparse.ArgumentParser) -> None:
    _add_sizes(attention)
    attention.add_argument("--kv-heads", type=count, help="key/value heads; as many as heads if not given")
    attention.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="which; default every legal one")
    attention.add_argument("--no-causal", dest="causal", action="store_false", help="every query sees every key")
    attention.add_argument(
        "--layer", action="store_true", help="the whole layer with its projections, not the core attention alone"
    )
    attention.add_argument("--width", type=count, help="the layer's model width; heads * head_dim if not given")
    attention.add_argument(
        "--residual",
        choices=["sharded", "replicated"],
        default="sharded",
        help="layout of the layer's residual stream",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    _add_grid(parser)
    parser.add_argument("--heads", type=count, default=16, help="heads")
    parser.add_argument("--head-dim", type=count, default=16, help="features of one head")
    parser.add_argument("--width", type=count, default=256, help="model width")
    parser.add_argument("--mlp-hidden", type=count, default=1024, help="width of the MLP, or of each expert")
    parser.add_argument("--layers", type=count, default=4, help="blocks")
    parser.add_argument("--experts", type=int, default=0, help="of each block; 0 for an MLP")
    parser.add_argument("--background", action="store_true", help="saves in the background too")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    _add_rounds(parser, rounds=5)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    _add_grid(parser)
    parser.add_argument("--heads", type=count, default=16, help="query heads")
    parser.add_argument("--head-dim", type=count, default=64, help="features of one head")
    parser.add_argument("--batch", type=count, default=4, help="samples")
    parser.add_argument("--length", type=count, default=256, help="tokens of one sample")
    _add_rounds(parser, rounds=15)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--m", type=count, default=4, help="feature slices")
    parser.add_argument("--n", type=count, default=4, help="head groups")
    parser.add_argument("--ranks", type=count, help="must be m * n, and is if not given")


def _add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=count, default=rounds, help="each runs every alternative twice")
    parser.add_argument("--warmup", type=count, default=2, help="steps of each alternative before the first round")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return int(text)


def _check(options: argparse.Namespace) -> None:
    """Fill in what follows from other options, and refuse what cannot run.

    Raises:
        PartitionError, ConfigError: in one sentence.
    """
    grid = Grid(options.m, options.n)
    options.ranks = options.ranks or grid.ranks
    if options.ranks != grid.ranks:
        raise ConfigError(f"--ranks {options.ranks} is not m*n = {grid.m}*{grid.n} = {grid.ranks}")
    if options.rounds < 2:
        raise ConfigError("an interval needs --rounds of at least 2, not 1")
    _check_machine(options)
    {"attention": _check_attention, "concat": _check_concat, "checkpoint": _check_saved}[options.what](options, grid)


def _check_machine(options: argparse.Namespace) -> None:
    started = environment.started()
    if started is not None:
        raise ConfigError(
            f"the bench forks its own ranks on one machine, whose clock they share; start it without {started.by}"
        )
    if options.json is not None:
        check_file("--json", options.json)


def _check_attention(options: argparse.Namespace, grid: Grid) -> None:
    options.kv_heads = options.kv_heads or options.heads
    options.width = options.width or options.heads * options.head_dim
    layout = _layout(options)
    grid.check(layout.heads, layout.kv_heads, layout.head_dim, layout.rope)
    for schedule in options.schedules or ():
        check_schedule(schedule, layout, grid, options.batch, options.length)
    options.schedules = options.schedules or legal_schedules(layout, grid, options.batch, options.length)
    if "perslice" not in options.schedules:
        options.schedules = ["perslice", *options.schedules]  # what the ratios are to


def _check_concat(options: argparse.Namespace, grid: Grid) -> None:
    grid.check(options.heads, head_dim=options.head_dim)
    if min(grid.m, grid.n) < 2:
        raise ConfigError(
            f"a hierarchy has two levels: --m and --n must be at least 2 each, not {grid.m} and {grid.n}"
        )


def _check_saved(options: argparse.Namespace, grid: Grid) -> None:
    shape = _shape(options)
    grid.check(shape.heads, shape.kv_heads, shape.head_dim, shape.rope)
    if not options.folder.is_dir():
        raise ConfigError(f"--folder {options.folder} is not a folder")


def _shape(options: argparse.Namespace) -> TransformerShape:
    heads, experts = options.heads, options.experts
    return TransformerShape(
        options.layers, options.width, heads, heads, options.head_dim, options.mlp_hidden, experts=experts
    )


def _layout(options: argparse.Namespace) -> HeadLayout:
    return HeadLayout(options.heads, options.kv_heads, options.head_dim)
