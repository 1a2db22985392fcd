"""`python -m helix plan`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helix.config.schema import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from helix.config.plan_schema import PlanConfig

_ALONE = ("published", "papers", "growth")
# Of those that matplotlib draws the ones that a person opens.
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as infer.py takes them: model=llama3_70b hardware=dgx_h100 devices=16 mode=generate goal=tpot "
        "workload.batch_size=8 workload.seq_len=4096 parallel.m=2; conf/plan.yaml has them all",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the choice here")
    parser.add_argument("--map", type=Path, metavar="PATH", help="draw where slices win here; 15 s of work")
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--known", action="store_true", help="plan five well-known models on 8 to 64 devices instead")
    told.add_argument("--published", action="store_true", help="hold the time model against published tables instead")
    told.add_argument("--papers", action="store_true", help="recompute the papers' 16 H100s instead")
    told.add_argument("--growth", type=Path, metavar="PATH", help="measure the search instead, and draw that here")


def run(options: argparse.Namespace) -> None:
    """Make the plan that was asked for, and print it.

    Raises:
        ConfigError, PartitionError: in one sentence, before anything is written.
    """
    for name in ("json", "plot", "map", "growth"):
        if getattr(options, name) is not None:
            check_file(f"--{name}", getattr(options, name), picture=name != "json")
    _check_alone(options)
    table, content = _told(options) if _is_told(options) else _planned(options)
    from rich.console import Console

    Console().print(table)
    if options.json is not None:
        from helix.study import provenance

        where = {
            "command": provenance.command(),
            "git_commit": provenance.git_commit(),
            "made_at": provenance.now(),
            "versions": provenance.versions(),
        }
        options.json.write_text(json.dumps(content | where, indent=2) + "\n")


def check_file(option: str, path: Path, picture: bool = False) -> None:
    """Check that a file that an option names can be written, and drawn if it is to be a picture.

    Raises:
        ConfigError: if it cannot.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {folder}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give a file's path")
    if picture and path.suffix.lower() not in PICTURES:
        raise ConfigError(f"{option} {path} names no kind of picture; end it with one of: {', '.join(PICTURES)}")
    try:  # rather than ask for permissions: root has them all, and some folders take no files
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written ({error.strerror}); give a path in a folder that takes files"
        ) from error


def _is_told(options: argparse.Namespace) -> bool:
    return any(getattr(options, name) for name in (*_ALONE, "known"))


def _check_alone(options: argparse.Namespace) -> None:
    given = [name for name in _ALONE if getattr(options, name)]
    if given and options.overrides:
        raise ConfigError(f"--{given[0]} takes no settings, such as {options.overrides[0]}")
    pictures = [name for name in ("plot", "map") if getattr(options, name) is not None]
    if _is_told(options) and pictures:
        raise ConfigError(f"--{pictures[0]} is of one plan, and not of --{(given or ['known'])[0]}")
    fixed = [word for word in options.overrides if word.startswith(("model=", "devices="))]
    if options.known and fixed:
        raise ConfigError(f"--known has models and numbers of devices of its own, instead of {fixed[0]}")


def _told(options: argparse.Namespace) -> tuple[RenderableType, dict[str, Any]]:
    """What is printed and written instead of a plan."""
    from helix.planner import papers, published
    from helix.study import plan_papers, plan_table

    if options.papers:
        found = papers.settings()
        return plan_papers.render(found), plan_papers.as_dict(found)
    if options.known:
        from helix.command.plan import known_of, settings, work_of

        one = settings(options.overrides)
        rows = known_of(one)
        table = plan_table.known(rows, work_of(one), one.goal, one.hardware.name)
        return table, {"rows": [row.as_dict() for row in rows]}
    if options.growth:
        from helix.figures.search import search_growth
        from helix.figures.style import save
        from helix.study import plan_growth
        from helix.study.provenance import now

        points = plan_growth.measure()
        content = plan_growth.as_dict(points)
        save(search_growth(content, now()[:10]), options.growth)
        return plan_growth.table(points), content
    tables = published.tables()
    return plan_table.published(tables), {"tables": [one.as_dict() for one in tables]}


def _planned(options: argparse.Namespace) -> tuple[RenderableType, dict[str, Any]]:
    from helix.command.plan import plan_of, settings
    from helix.study import plan_table

    one = settings(options.overrides)
    plan = plan_of(one)
    content = plan.as_dict()
    if options.plot is not None:
        from helix.figures.pareto import pareto
        from helix.figures.style import save

        save(pareto(content), options.plot)
    if options.map is not None:
        content["map"] = _mapped(one, options.map)
    return plan_table.render(plan), content


def _mapped(one: PlanConfig, path: Path) -> list[dict[str, Any]]:
    """Draw the map, and return its figures."""
    from helix.command.plan import map_of
    from helix.figures.maps import winning_map
    from helix.figures.style import save

    panels = [panel.as_dict() for panel in map_of(one)]
    title = f"{one.model.name} on {one.hardware.name}; {one.mode}, {one.precision}"
    save(winning_map(panels, title), path)
    return panels
