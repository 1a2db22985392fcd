"""Command lines as nobody would write them, and as everybody does: hypothesis strategies over all commands' words.

What may run is tiny. Sizes are either so small that a run takes seconds or so large that no machine here takes them:
between them lies what is legal and would take the night.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from fuzz_words import BROKEN, ENDLESS, ENVIRONMENTS, FILES, FLAGS, FOLDERS, FORMS, HUGE, HYDRA, ILLEGAL, ODD, SMALL
from hypothesis import strategies as st

from helix.config.plan_schema import PlanConfig
from helix.config.schema import InferConfig
from helix.config.train_schema import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@dataclass(frozen=True)
class Line:
    """A command line, the files of the folder that it is typed in, and its environment."""

    command: tuple[str, ...]
    words: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What runs, as counts are kept: infer.py, or plan."""
        if self.command[0] != "-m":
            return Path(self.command[0]).name
        return self.words[0] if self.words and self.words[0] in SUBCOMMANDS else "python -m helix"


SUBCOMMANDS = ("plan", "verify", "claims", "bench", "calibrate", "validate", "checkpoint", "gguf")
SCHEMAS: dict[str, type] = {"infer": InferConfig, "train": TrainConfig, "plan": PlanConfig}
BASES = {
    "infer": "model={} parallel={} workload.seq_len=16 workload.batch_size=2 workload.warmup=0 workload.iterations=1 "
    "workload.runs=2 logger=none",
    "train": "model={} parallel={} data.seq_len=16 data.batch_size=2 data.limit_bytes=100000 trainer.max_steps=2 "
    "data.validation_batches=1 optimizer.warmup_steps=1 logger=none",
    "plan": "model={} parallel.m=2 devices=4",
}
MODELS = ("tiny", "tiny", "tiny_moe")
GRIDS = ("single", "helix_1x2", "helix_2x1", "helix_2x2", "helix_2x1", "dp16", "tp2_pp2")
GROUPS = ("parallel", "model", "workload", "hardware", "logger", "experiment", "data", "optimizer", "trainer")


def leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key of a command, with its type and its field."""
    hints = get_type_hints(schema)
    for spec in fields(schema):
        if is_dataclass(hints[spec.name]):
            yield from leaves(hints[spec.name], f"{prefix}{spec.name}.")
        else:
            yield prefix + spec.name, hints[spec.name], spec


def _legal(key: str, hint: Any, spec: Any) -> tuple[str, ...]:
    name = key.rpartition(".")[2]
    if "choices" in spec.metadata:
        return tuple(spec.metadata["choices"])
    if name in SMALL:
        return SMALL[name]
    if hint is bool:
        return ("true", "false")
    return ("1", "2", "0.5") if "float" in str(hint) else ("1", "2")


def _odd(key: str) -> st.SearchStrategy[str]:
    """What a key may not take, or takes to everybody's surprise."""
    odd: tuple[str, ...] = (*ILLEGAL, *HUGE, *ODD)
    anything = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
    if key.rpartition(".")[2] in ENDLESS:
        odd = tuple(one for one in odd if one not in (*HUGE, "1_000", "1e3", "0x10"))
        anything = anything.filter(lambda text: not any(map(str.isdigit, text)))
    return st.one_of(*[st.sampled_from(odd)] * 4, st.sampled_from(BROKEN), anything)


def _values(key: str, hint: Any, spec: Any) -> st.SearchStrategy[str]:
    """Values of a key, legal or not."""
    return st.sampled_from(_legal(key, hint, spec)) | _odd(key)


def _options(group: str) -> tuple[str, ...]:
    """Options of a group that are small enough to run, and others that only a large machine takes."""
    legal = tuple(path.stem for path in sorted((CONF / group).glob("*.yaml")))
    slow = {
        "workload": ("paper_1024", "generation"),
        "trainer": ("short",),
        "experiment": legal,
        "parallel": ("tp16",),
    }
    slow["model"] = ("moe", *(f"paper_{name}" for name in ("dense_2l", "dense_4l", "dense_16l", "moe_4l")))
    # An experiment is a legal run that lasts, except with another command's settings.
    return tuple(one for one in legal if one not in slow.get(group, ())) or ("nowhere",)


@st.composite
def legal_words(draw: st.DrawFn, command: str) -> str:
    """A key or a group with a value of its kind, which may still fit nothing else."""
    if draw(st.integers(0, 5)) == 0:
        group = draw(st.sampled_from(GROUPS))
        return f"{group}={draw(st.sampled_from(_options(group)))}"
    key, hint, spec = draw(st.sampled_from(_keys(command)))
    return f"{key}={draw(st.sampled_from(_legal(key, hint, spec)))}"


@st.composite
def odd_words(draw: st.DrawFn, command: str) -> str:
    """One word in Hydra's grammar, or nearly."""
    kind = draw(
        st.sampled_from(["value"] * 10 + ["group", "group", "form", "form", "key", "sweep", "hydra", "hydra", "odd"])
    )
    if kind == "hydra":
        return draw(st.sampled_from(HYDRA)).replace("@", draw(st.sampled_from(FOLDERS)))
    if kind == "odd":
        return draw(st.sampled_from(ODD) | st.text(st.characters(exclude_characters="\0"), max_size=12))
    if kind == "group":
        return f"{draw(st.sampled_from(GROUPS))}={draw(st.sampled_from(ODD))}"
    key, hint, spec = draw(st.sampled_from(_keys(command)))
    value = draw(_values(key, hint, spec))
    if kind == "value":
        return f"{key}={draw(_odd(key))}"
    if kind == "sweep":
        return f"{key}={value},{draw(_values(key, hint, spec))}"
    if kind == "key":
        at = draw(st.integers(0, len(key)))
        key = key[:at] + draw(st.sampled_from(["", "x", ".", ".x", "_", "/", "@", "é", "-", "[0]"])) + key[at + 1 :]
    return draw(st.sampled_from(FORMS)).format(key, value)


@st.composite
def overrides(draw: st.DrawFn, command: str) -> list[str]:
    """Words of which few are odd: the first fault that is found hides all others."""
    legal = draw(st.lists(legal_words(command), max_size=3))
    odd = draw(st.sampled_from([0, 0, 1, 1, 1, 1, 2]))
    return [*legal, *(draw(odd_words(command)) for _ in range(odd))]


@cache
def _keys(command: str) -> list[tuple[str, Any, Any]]:
    """Each key, those of hardware's many figures less often."""
    every = list(leaves(SCHEMAS[command]))
    return 3 * [one for one in every if not one[0].startswith("hardware.")] + every


@st.composite
def yaml_texts(draw: st.DrawFn, command: str, group: str) -> bytes:
    """A config of the user's own: keys of the group with values of any kind, or a file that is damaged."""
    keys = [one for one in _keys(command) if one[0].startswith(f"{group}.")]
    lines = ["name: mine"] if draw(st.booleans()) else []
    if draw(st.integers(0, 4)) == 0:
        lines.append(
            draw(st.sampled_from(["defaults: [tiny]", "defaults:\n  - _self_", "defaults: x", "defaults:\n- /x: y"]))
        )
    for key, hint, spec in draw(st.lists(st.sampled_from(keys or _keys(command)), max_size=4)):
        lines.append(f"{key.rpartition('.')[2]}: {draw(_values(key, hint, spec))}")
    text = "\n".join(lines).encode(errors="surrogateescape")
    return draw(
        st.sampled_from([text] * 6 + [text.decode(errors="ignore").encode("utf-16"), b"\xff" + text, text + b"\0"])
    )


@st.composite
def job_lines(draw: st.DrawFn, command: str) -> Line:
    """Of infer.py or train.py."""
    words = BASES[command].format(draw(st.sampled_from(MODELS)), draw(st.sampled_from(GRIDS))).split()
    files = dict(FILES)
    if command == "infer" and draw(st.integers(0, 2)) == 0:
        words.append("dry_run=true")
    words += draw(overrides(command))
    if draw(st.integers(0, 7)) == 0:
        group = draw(st.sampled_from(["model", "parallel", "workload", "hardware", "data", "optimizer", "logger"]))
        files[f"mine/{group}/mine.yaml"] = draw(yaml_texts(command, group))
        words = ["--config-dir", "mine", *words, f"{group}=mine"]
    elif draw(st.integers(0, 7)) == 0:
        files["mine/mine.yaml"] = draw(yaml_texts(command, draw(st.sampled_from(["model", "seed"]))))
        words = [*draw(st.sampled_from(FLAGS)), *words]
    env = draw(st.sampled_from(ENVIRONMENTS)) if draw(st.integers(0, 11)) == 0 else {}
    return Line((str(ROOT / f"{command}.py"),), tuple(words), files, env)
