"""The names of methods: helix_4x4, tp8_pp2, dp16 and the others, as `parallel=` and `baseline=[..]` take them.

A name says how many ranks there are and what each has; of the options that a method reads besides, baselines take
the main method's (`baselines_of`).
"""

from __future__ import annotations

import re
from dataclasses import replace

from helix.config.parallel import AUTO, DECODES
from helix.config.schema import ConfigError, InferConfig, ParallelConfig
from helix.partition.schedules import SCHEDULES

# By `ParallelConfig.method`. n of a peer is the number of ranks that share one replica and stage.
_FORMS = {
    "helix": rf"helix_(?P<m>\d+)x(?P<n>\d+)(_dp(?P<data>\d+))?(_(?P<schedule>{'|'.join(SCHEDULES)}))?"
    rf"(_decode_(?P<decode>{'|'.join(DECODES[1:])}))?",
    "single": "single",
    "data": r"dp(?P<data>\d+)",
    "tensor": r"tp(?P<n>\d+)(?P<sharded>_sp)?(_pp(?P<stage>\d+))?(_dp(?P<data>\d+))?",
    "context": r"cp(?P<n>\d+)",
    "ulysses": r"ulysses(?P<n>\d+)",
    "autotp": r"autotp(?P<n>\d+)",
    "transformers": r"hf_tp(?P<n>\d+)",
}
LEGAL = "single, dp16, tp16, tp16_sp, tp8_pp2, tp4_dp4, cp16, ulysses16, autotp16, hf_tp16, helix_2x8, helix_2x8_rows"


def from_name(name: str) -> ParallelConfig:
    """The layout that a method's name means.

    Raises:
        ConfigError: if it is none.
    """
    for method, form in _FORMS.items():
        if match := re.fullmatch(form, name):
            given = {key: value for key, value in match.groupdict().items() if value is not None}
            sizes = {key: int(value) for key, value in given.items() if value.isdecimal()}
            if 0 in sizes.values():
                break
            schedule, decode = (given.get(phase, "auto") for phase in ("schedule", "decode"))
            layout = ParallelConfig(method=method, m=1, n=1, schedule=schedule, decode=decode)
            for key, size in sizes.items():
                setattr(layout, key, size)
            if method == "tensor":
                layout.residual = "sharded" if "sharded" in given else "replicated"
            return layout
    raise ConfigError(f"there is no method {name!r}; methods are named like {LEGAL} (any sizes)")


def to_name(layout: ParallelConfig) -> str:
    """The method's name; `from_name` reads it. A schedule is part of it where it was asked for."""
    name = {
        AUTO: AUTO,  # for which nothing was found
        "helix": f"helix_{layout.m}x{layout.n}",
        "single": "single",
        "data": f"dp{layout.data}",
        "tensor": f"tp{layout.n}" + ("_sp" if layout.residual == "sharded" else ""),
        "context": f"cp{layout.n}",
        "ulysses": f"ulysses{layout.n}",
        "autotp": f"autotp{layout.n}",
        "transformers": f"hf_tp{layout.n}",
    }[layout.method]
    if layout.stage > 1:
        name += f"_pp{layout.stage}"
    if layout.data > 1 and layout.method in ("helix", "tensor"):
        name += f"_dp{layout.data}"
    if layout.method == "helix" and layout.schedule != "auto":
        name += f"_{layout.schedule}"
    if layout.method == "helix" and layout.decode != "auto":
        name += f"_decode_{layout.decode}"
    return name


def baselines_of(settings: InferConfig) -> list[ParallelConfig]:
    """The layouts of `baseline`, with the main method's options where they read them too.

    Raises:
        ConfigError: if a name is no method's.
    """
    main = settings.parallel
    return [_with_options(from_name(name), main) for name in settings.baseline]


def _with_options(layout: ParallelConfig, main: ParallelConfig) -> ParallelConfig:
    layout = replace(layout, microbatches=main.microbatches)
    if layout.method != "helix" or main.method != "helix":
        return layout
    return replace(
        layout, aggregate=main.aggregate, concat=main.concat, projection=main.projection, residual=main.residual
    )
