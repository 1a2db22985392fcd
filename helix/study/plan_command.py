"""`python -m helix plan`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from helix.config.schema import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as infer.py takes them: model=llama3_70b hardware=dgx_h100 devices=16 mode=generate goal=tpot "
        "workload.batch_size=8 workload.seq_len=4096 parallel.m=2; conf/plan.yaml has them all",
    )
    parser.add_argument("--map", type=Path, metavar="PATH", help="draw where slices win, over devices and batch, here")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the choice here")
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--published", action="store_true", help="hold the time model against published tables instead")
    told.add_argument("--papers", action="store_true", help="recompute the papers' 16 H100s instead")


def run(options: argparse.Namespace) -> None:
    """Make the plan that was asked for, and print it.

    Raises:
        ConfigError, PartitionError: in one sentence, before anything is written.
    """
    from rich.console import Console

    from helix.study import plan_table

    for option, path in (("--json", options.json), ("--plot", options.plot), ("--map", options.map)):
        if path is not None:
            check_file(option, path)
    if options.published or options.papers:
        if options.overrides or options.json or options.plot or options.map:
            raise ConfigError("--published and --papers take no settings and write no files; give them alone")
        Console().print(plan_table.published() if options.published else plan_table.papers())
        return
    from helix.command.plan import map_of, plan_of, settings

    one = settings(options.overrides)
    plan = plan_of(one)
    Console().print(plan_table.render(plan))
    if options.json is not None:
        options.json.write_text(json.dumps(plan.as_dict(), indent=2) + "\n")
    if options.plot is None and options.map is None:
        return
    from helix.study import plan_plots
    from helix.study.plots import save

    if options.plot is not None:
        save(plan_plots.pareto_chart(plan), options.plot)
    if options.map is not None:
        save(plan_plots.winning_chart(plan, map_of(one)), options.map)


def check_file(option: str, path: Path) -> None:
    """Check that a file that an option names can be written.

    Raises:
        ConfigError: if it cannot.
    """
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give a file's path")
