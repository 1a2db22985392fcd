"""Damaged files of every kind that Helix reads: a value or the reader's own error, soon and in little memory."""

from __future__ import annotations

import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzz_files import safetensors
from fuzz_readers import ROOT, check, targets
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# What does harm where a figure, a text or a list was.
WORDS = (
    *(b"null", b"-1", b"0", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" * 40, b"9" * 400, b"1" * 5000),
    *(
        b"[]",
        b"{}",
        b'""',
        b'"x"',
        b"[[[]]]",
        b"[" * 3000,
        b'{"a":' * 3000,
        b"{a: " * 300,
        b"- " * 300,
        b"\x00",
        b"\xff",
    ),
    *(
        b'"../../etc/passwd"',
        b'"/etc/passwd"',
        b"&a [*a, *a]",
        b"*a",
        b"${x}",
        b"${oc.env:HOME}",
        b"? [a]\n: b",
        b"<<: x",
    ),
    *(
        b"!!python/object/apply:os.getcwd []",
        b"!!binary x",
        b"2026-13-45",
        b"0o9",
        b"1:60:60",
        b"!!int x",
        b"!!float x",
    ),
    *(
        b"\xef\xbb\xbf",
        "é".encode("latin-1"),
        "\ud800".encode(errors="surrogatepass"),
        "\u2028".encode(),
        b"\r",
        b"\\u0000",
    ),
)


@st.composite
def damaged(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A file with a few pieces cut out, doubled, turned over, or put in place of others."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 30, 10**6])))
        part = content[at:end]
        part = draw(
            st.sampled_from([b"", part + part, bytes(255 - one for one in part), *WORDS, *WORDS])
            | st.binary(max_size=9)
        )
        content = content[:at] + part + content[end:]
    return draw(st.sampled_from([content] * 9 + [content.decode("latin-1").encode("utf-16")]))


@st.composite
def retyped(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A file of JSON or YAML's words of which one is another."""
    content = draw(st.sampled_from(seeds))
    spots = [at for at, byte in enumerate(content) if byte in b":[,"]
    at = draw(st.sampled_from(spots)) + 1 if spots else 0
    ends = [end for end, byte in enumerate(content) if end > at and byte in b",]}\n"]
    end = ends[draw(st.integers(0, min(4, len(ends) - 1)))] if ends else len(content)
    return content[:at] + b" " + draw(st.sampled_from(WORDS)) + content[end:]


def _mutated(name: str, examples: int) -> None:
    target = targets()[name]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(target.seeds) | retyped(target.seeds))
    def holds(content: bytes) -> None:
        check(target, content)

    holds()


# What generated files have found, small: each was another exception than the reader's own.
FOUND = [
    ("claims", b"!!int x"),
    ("claims", b"a: " + b"[" * 3000),
    ("claims", b"2026-13-45"),
    ("claims", targets()["claims"].seeds[0].replace(b"{run: run.json}", b"{test: 'paper/claims.yaml::test_x'}")),
    ("hardware", b"{" * 3000),
    ("hardware", b"!!bool x"),
    ("hardware", b"name: x\nsource: y\nturns: {ranks: [1], times: [[]], low: [1], high: [1]}"),
    ("hardware", b"name: x\nsource: y\nturns: {ranks: &a [*a]}"),
    ("calibration", b"a: ["),
    ("calibration", b"a: 1"),
    ("calibration", b"name: [x]"),
    ("calibration", b"source: x"),
    # An array of 2 ** 40 numbers, which gguf's own reader looks for.
    ("gguf", b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**40)),
    ("config", b'{"a":' * 3000),
    ("import", safetensors({"__metadata__": {"helix": '{"x": 1}'}}, 0)),
    ("import", safetensors({"__metadata__": {"helix": "[" * 3000}}, 0)),
    ("template", b"1"),
    ("template", b"[" * 3000),
    ("outcome", b"[" * 3000),
    ("outcome", b'{"settings": "DIGEST", "tokens_per_s": {"mean": [1]}}'),
    ("outcome", b'{"settings": "DIGEST", "tokens_per_s": {"mean": ' + b"9" * 400 + b"}}"),
    ("job", b"\xff"),
    ("job", b"seed: 1\n---\nhydra: {job: {num: x}}\n---\n[]"),
    ("figure", b"[0].x\nx\n1,2"),
    ("figure", b"[0].x\nx\n\x00" + b"1" * 200_000),
    ("figure", b'a.*\n{"a": [1]}'),
    ("figure", b'a\n{"a": ' + b"9" * 400 + b"}"),
    ("figure", b"a\n" + b"[" * 3000),
]
QUICK = sorted(set(targets()) - {"wandb"})


@pytest.mark.parametrize("name", sorted(targets()))
def test_sound_files_are_read(name: str) -> None:
    target = targets()[name]
    assert check(target, target.seeds[0]), "else nothing behind the first check is reached"


@pytest.mark.parametrize(("name", "content"), FOUND, ids=lambda one: one if isinstance(one, str) else "")
def test_what_was_found_is_mended(name: str, content: bytes) -> None:
    check(targets()[name], content)


@pytest.mark.parametrize("name", QUICK)
def test_damaged_files_give_a_value_or_the_readers_error(name: str) -> None:
    slow = name in ("hardware", "calibration", "job")  # a tenth of a second each
    _mutated(name, examples=4 if slow else 15)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", sorted(targets()))
def test_hundreds_of_damaged_files(name: str) -> None:
    _mutated(name, examples={"wandb": 20, "hardware": 60, "calibration": 60, "job": 100}.get(name, 500))


@pytest.mark.fuzz
@pytest.mark.skipif(find_spec("atheris") is None, reason="no atheris: pip install -e '.[fuzz]', Linux on x86-64 only")
@pytest.mark.parametrize("name", ["claims", "gguf"])
def test_damage_guided_by_coverage(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "tests/fuzz_readers.py", name, "--seconds=8", "--keep", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stat::number_of_executed_units" in done.stderr
