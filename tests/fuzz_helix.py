"""Command lines of `python -m helix` and its subcommands: the options of each with legal, odd and illegal values."""

from __future__ import annotations

from fuzz_lines import BASES, CONF, GRIDS, SUBCOMMANDS, Line, job_lines, overrides
from fuzz_words import FILES, FOLDERS, HUGE, ILLEGAL, ODD
from hypothesis import strategies as st

# Options of argparse: its legal values, all cheap; none for a flag. What is not given has a value in BEFORE.
_PATHS = ("x.json", "no/x.json", "taken", ".", "", "taken/x.json", "é.json", "A" * 300, "/proc/x.json", "broken")
_ROUNDS = {"--rounds": ("2", "2", "1", "3"), "--warmup": ("1", "0"), "--seed": ("0", "7", "-1"), "--json": _PATHS}
_GRID = {"--m": ("1", "2"), "--n": ("1", "2", "3"), "--ranks": ("2", "4"), "--heads": ("2", "4", "9"), **_ROUNDS}
_HARDWARE = ("dgx_h100", "h200", "nowhere", "mine.yaml", "broken.yaml", "taken", "text.txt", "../h200", "")
_PICTURES = ("x.png", "x.svg", "x.txt", "no/x.png", ".", "taken", "é.png")
_SIZES = {**_GRID, "--head-dim": ("8", "12", "7"), "--batch": ("1", "2", "3"), "--length": ("1", "8", "9")}
_BENCHES = {
    "attention": _SIZES
    | {"--kv-heads": ("1", "2", "3"), "--schedules": ("perslice", "batch", "rows", "ring"), "--no-causal": ()}
    | {"--layer": (), "--width": ("32", "48", "7"), "--residual": ("sharded", "replicated", "x")},
    "concat": _SIZES,
    "checkpoint": _GRID
    | {"--head-dim": ("8", "7"), "--width": ("32", "48", "7"), "--mlp-hidden": ("64", "7"), "--layers": ("1", "2")}
    | {"--experts": ("0", "2", "3", "-1"), "--background": (), "--folder": FOLDERS},
}
_BEFORE = {
    "attention": "--m 2 --n 1 --heads 4 --head-dim 8 --batch 2 --length 8 --rounds 2 --warmup 1",
    "concat": "--m 2 --n 2 --heads 4 --head-dim 8 --batch 2 --length 8 --rounds 2 --warmup 1",
    "checkpoint": "--m 2 --n 1 --heads 2 --head-dim 8 --width 16 --mlp-hidden 32 --layers 1 --rounds 2 --warmup 1",
}
_PLANS = {"--json": _PATHS, "--plot": _PICTURES, "--known": (), "--published": (), "--growth": ("no/x.png", "x.txt")}
_CLAIMS = {
    "--ledger": (*_PATHS, "mine/claims.yaml", "text.txt"),
    "--verdict": ("reproduced", "not-testable", "x"),
    "--paper": ("full", "concise", "x", ""),
    "--id": ("x", "", "attention"),
    "--check": (),
    "--markdown": (),
    "--update": _PATHS,
}
_VALIDATE = {
    "--ranks": ("0", "1", "2", "99"),
    "--layouts": ("0", "1", "2"),
    "--rounds": ("0", "1", "2"),
    "--device": ("auto", "cpu", "cuda", "x"),
    "--json": _PATHS,
    "--plot": _PICTURES,
    "--write": (),
    **{f"--{name}": ("0", "1", "nan", "x") for name in ("least-tau", "most-error", "most-memory-error", "least-good")},
}
_CALIBRATE = {
    "--name": ("mine", "taken", "9x", "a/b", "", "é", "../x", "A" * 300),
    "--device": ("cuda", "x", "cpu"),
    "--ranks": ("0", "-1", "x", "99", "2.5"),
    "--quick": (),
    "--force": (),
}
_HUGE_TOO = frozenset({"--m", "--n", "--ranks", "--heads", "--seed", "--layouts"})


@st.composite
def _options(draw: st.DrawFn, options: dict[str, tuple[str, ...]], most: int = 3) -> list[str]:
    words: list[str] = []
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=most)):
        given = draw(st.sampled_from([name] * 12 + [name[:-1], name + "s", name.lstrip("-"), name.upper()]))
        if not options[name]:
            words.append(given)
            continue
        odd = (*ILLEGAL, *HUGE, *ODD) if name in _HUGE_TOO or not name.islower() else ILLEGAL
        value = draw(st.sampled_from(options[name]) | st.sampled_from(options[name]) | st.sampled_from(odd))
        words += draw(st.sampled_from([[given, value]] * 6 + [[f"{given}={value}"], [given], [given, value, value]]))
    return words


@st.composite
def _bench(draw: st.DrawFn) -> list[str]:
    what = draw(st.sampled_from([*_BENCHES] * 4 + ["x", ""]))
    options = _BENCHES.get(what, _SIZES)
    return ["bench", what, *_BEFORE.get(what, "").split(), *draw(_options(options))]


@st.composite
def _plan(draw: st.DrawFn) -> list[str]:
    words = BASES["plan"].format(draw(st.sampled_from(["tiny", "llama3_70b", "dense", "nowhere"]))).split()
    words += draw(overrides("plan"))
    if draw(st.integers(0, 5)) == 0:
        words.append(f"hardware={draw(st.sampled_from(_HARDWARE))}")
    return ["plan", *words, *draw(_options(_PLANS, most=1))]


@st.composite
def _verify(draw: st.DrawFn) -> list[str]:
    precisions = draw(st.sampled_from(["fp32", "fp32", "fp64", "fp99", "", "fp32,", "fp32,fp32", "é"]))
    model = f"model={draw(st.sampled_from(['tiny', 'tiny', 'tiny_moe', 'smollm2', 'nowhere']))}"
    grid = f"parallel={draw(st.sampled_from(['helix_2x1', 'helix_1x2', *GRIDS]))}"
    given = draw(overrides("infer"))
    return [
        "verify",
        model,
        grid,
        *given,
        "--precisions",
        precisions,
        *draw(_options({"--json": _PATHS, "--all": ()})),
    ]


@st.composite
def _files(draw: st.DrawFn) -> list[str]:
    """Of checkpoint and gguf, whose arguments are files."""
    place = st.sampled_from([*_PATHS, *FOLDERS, "text.txt", "broken", "x.safetensors", "x.gguf", "--x"])
    what = draw(
        st.sampled_from([["checkpoint", "export"], ["checkpoint", "import"], ["checkpoint", "verify"], ["gguf"]])
    )
    words = [*what, *draw(st.lists(place, max_size=3))]
    return [*words, *draw(_options({"--dtype": ("float32", "float16", "x")}, most=1))]


@st.composite
def helix_lines(draw: st.DrawFn) -> Line:
    """Of `python -m helix`."""
    strategies = {
        "plan": _plan(),
        "verify": _verify(),
        "claims": _options(_CLAIMS).map(lambda words: ["claims", *words]),
        "bench": _bench(),
        # Without a name it is refused; with --device cuda, or in a folder that is none, too: none measures.
        "calibrate": _options(_CALIBRATE).map(lambda words: ["calibrate", *words, "--folder", "taken", "--quick"]),
        "validate": st.tuples(st.sampled_from(_HARDWARE), _options(_VALIDATE)).map(
            lambda pair: ["validate", pair[0], *pair[1], "--ranks", "1"]
        ),
        "files": _files(),
        "none": st.lists(st.sampled_from([*SUBCOMMANDS, "-h", "--version", "x", "", "--x"]), max_size=1),
    }
    words = draw(strategies[draw(st.sampled_from(["plan", "plan", "verify", "bench", "bench", *strategies]))])
    files = dict(FILES)
    files["mine/claims.yaml"] = draw(
        st.binary(max_size=8) | st.sampled_from([b"papers: {}", b"claims: []", b"[1]", b""])
    )
    files["mine.yaml"] = (CONF / "hardware/h200.yaml").read_bytes()
    files["broken.yaml"] = draw(st.sampled_from([b"[", b"a: 1", b"\xff", b"", b"name: x\nhosts: y\n", b"name: ${a}"]))
    return Line(("-m", "helix"), tuple(words), files)


def lines() -> st.SearchStrategy[Line]:
    """Of all commands."""
    return st.one_of(job_lines("infer"), job_lines("infer"), job_lines("train"), helix_lines())
