"""`python -m helix bench attention|concat|checkpoint`, `checkpoint export|import|verify`, `plan`, `gguf`; the options.

They are checked without torch.

Exit codes as in `helix.command.cli`: 0 done, 1 failed while running, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from helix.checkpoint.content import CheckpointError
from helix.checkpoint.manifest import CheckpointWarning, checkpoints, verify
from helix.config import environment
from helix.config.schema import ConfigError
from helix.partition.grid import Grid, HeadLayout, PartitionError
from helix.partition.schedules import SCHEDULES, check_schedule, legal_schedules
from helix.partition.shape import TransformerShape
from helix.pretrained import gguf
from helix.study import plan_command


class _Parser(argparse.ArgumentParser):
    """Errors of one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        _stop(f"{message} (--help lists the options)", code=2)


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    try:
        if options.command == "bench":
            _check(options)
            _bench(options)
        elif options.command == "plan":
            plan_command.run(options)
        elif options.command == "gguf":
            gguf.convert(options.file, options.folder, options.dtype)
        else:
            _checkpoint(options)
    except (PartitionError, ConfigError, CheckpointError) as error:
        _stop(str(error), code=2)
    except KeyboardInterrupt:
        _stop("interrupted", code=130)
    except RuntimeError as error:
        _stop(str(error), code=1)


def _checkpoint(options: argparse.Namespace) -> None:
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
            print(f"python -m helix: warning: {each.message}", file=sys.stderr)
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
            _say(str(error))
        else:
            print(f"{path} is whole: {len(manifest.tensors)} tensors, {manifest.nbytes / 1e6:.1f} MB")
    if damaged:
        raise SystemExit(2)


def _bench(options: argparse.Namespace) -> None:
    from rich.console import Console

    from helix.study import bench, bench_checkpoint  # brings torch

    grid, rounds = Grid(options.m, options.n), bench.Rounds(options.rounds, options.warmup, options.seed)
    result: bench.Comparison | bench_checkpoint.CheckpointComparison
    if options.what == "checkpoint":
        held = bench_checkpoint.CheckpointCase(_shape(options), grid, options.folder, options.background)
        result = bench_checkpoint.bench_checkpoint(held, rounds)
    elif options.what == "attention":
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
        outputs = bench.ConcatCase(options.heads, options.head_dim, grid, options.batch, options.length)
        result = bench.bench_concat(outputs, rounds)
    Console().print(result.table())
    if options.json is not None:
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps(result.as_dict() | {"settings": settings}, indent=2) + "\n")


def _stop(reason: str, code: int) -> NoReturn:
    _say(reason)
    raise SystemExit(code)


def _say(error: str) -> None:
    print(f"python -m helix: error: {' '.join(error.split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m helix", description=__doc__.split(";")[0].replace("`", ""))
    commands = parser.add_subparsers(dest="command", required=True, metavar="{bench,checkpoint,plan,gguf}")
    bench = commands.add_parser("bench", help="measure alternatives side by side, alternating in one launch")
    benches = bench.add_subparsers(dest="what", required=True, metavar="{attention,concat,checkpoint}")
    attention = benches.add_parser(
        "attention",
        help="every legal schedule on the attention layer",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_sizes(attention)
    attention.add_argument("--kv-heads", type=_count, help="key/value heads; as many as heads if not given")
    attention.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="which; default every legal one")
    attention.add_argument("--no-causal", dest="causal", action="store_false", help="every query sees every key")
    attention.add_argument(
        "--layer", action="store_true", help="the whole layer with its projections, not the core attention alone"
    )
    attention.add_argument("--width", type=_count, help="the layer's model width; heads * head_dim if not given")
    attention.add_argument(
        "--residual",
        choices=["sharded", "replicated"],
        default="sharded",
        help="layout of the layer's residual stream",
    )
    concat = benches.add_parser(
        "concat",
        help="the papers' hierarchical concatenation of attention outputs against a flat one",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_sizes(concat)
    _add_checkpoint_bench(
        benches.add_parser(
            "checkpoint",
            help="saving and loading a model with AdamW's state against writing and reading as many bytes",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    plan_command.add_options(commands.add_parser("plan", help="choose a layout for a machine, with its cost and why"))
    _add_checkpoint(commands.add_parser("checkpoint", help="whole weights to and from one safetensors file"))
    converted = commands.add_parser("gguf", help="make a GGUF file a Hugging Face folder, which model.path= takes")
    converted.add_argument("file", type=Path, help="of llama.cpp, quantized or not", metavar="FILE.gguf")
    converted.add_argument("folder", type=Path, help="the new folder", metavar="FOLDER")
    converted.add_argument("--dtype", choices=gguf.DTYPES, default="float32", help="of the new weights")
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
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


def _add_checkpoint_bench(parser: argparse.ArgumentParser) -> None:
    _add_grid(parser)
    parser.add_argument("--heads", type=_count, default=16, help="heads")
    parser.add_argument("--head-dim", type=_count, default=16, help="features of one head")
    parser.add_argument("--width", type=_count, default=256, help="model width")
    parser.add_argument("--mlp-hidden", type=_count, default=1024, help="width of the MLP, or of each expert")
    parser.add_argument("--layers", type=_count, default=4, help="blocks")
    parser.add_argument("--experts", type=int, default=0, help="of each block; 0 for an MLP")
    parser.add_argument("--background", action="store_true", help="saves in the background too")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    _add_rounds(parser, rounds=5)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    _add_grid(parser)
    parser.add_argument("--heads", type=_count, default=16, help="query heads")
    parser.add_argument("--head-dim", type=_count, default=64, help="features of one head")
    parser.add_argument("--batch", type=_count, default=4, help="samples")
    parser.add_argument("--length", type=_count, default=256, help="tokens of one sample")
    _add_rounds(parser, rounds=15)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--m", type=_count, default=4, help="feature slices")
    parser.add_argument("--n", type=_count, default=4, help="head groups")
    parser.add_argument("--ranks", type=_count, help="must be m * n, and is if not given")


def _add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
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
        plan_command.check_file("--json", options.json)


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


if __name__ == "__main__":
    main()
