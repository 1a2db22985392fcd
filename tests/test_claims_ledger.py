"""What a ledger of claims has to say, what is refused of it, and the command on a small one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helix.__main__ import main
from helix.claims import markdown, resolve, table
from helix.claims.faults import faults
from helix.claims.ledger import INCONSISTENT, LedgerError, read
from helix.config.schema import ConfigError

SMALL = {
    "papers": {"full": {"title": "A title", "setting": "a setting"}},
    "claims": [
        {
            "id": "full-d", "paper": "full", "section": "Results", "quote": "d = 2.85", "why": "It is not.",
            "verdict": INCONSISTENT, "value": {"figure": 2.85, "unit": "count"},
            "ours": [{"label": "d", "kind": "computed", "unit": "count"}],
            "check": {"name": "cohens_d",
                      "given": {"before": 1.2e6, "after": 1.58e6, "half": 5000, "runs": 5, "stated": 2.85}},
        },
        {
            "id": "full-run", "paper": "full", "section": "Results", "quote": "as fast", "why": "So it is.",
            "verdict": "reproduced",
            "ours": [{"label": "ratio", "kind": "measured", "unit": "times", "file": "paper/run.json",
                      "path": "rows[name=a,m=4].ratio", "interval": "rows[name=a,m=4].ci95"}],
            "evidence": [{"test": "tests/test_a.py::test_one"}, {"run": "paper/run.json"},
                         {"command": "python -m helix plan --papers"}],
        },
    ],
}  # fmt: skip
RUN = {
    "rows": [{"name": "b", "m": 4, "ratio": 3}, {"name": "a", "m": 4, "ratio": 2.0, "ci95": [1.0, 3.0], "low": 1.5}],
    "bytes": {"all_gather/x.y": 3, "other": 4},
    "word": "none",
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a repository with a ledger, a run and a test in it; returns the ledger's path."""
    for folder in ("paper", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "paper/run.json").write_text(json.dumps(RUN))
    (tmp_path / "tests/test_a.py").write_text("def test_one() -> None: ...\n\n\ndef helper() -> None: ...\n")

    def write(content: Any) -> Path:
        path = tmp_path / "paper/claims.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def changed(number: int, **keys: Any) -> dict[str, Any]:
    """The small ledger with keys of one claim set, or taken out where None is given."""
    content = copy.deepcopy(SMALL)
    claims: Any = content["claims"]
    claims[number].update(keys)
    claims[number] = {key: value for key, value in claims[number].items() if value is not None}
    return content


def faults_of(path: Path) -> list[str]:
    try:
        return faults(read(path))
    except LedgerError as error:
        return list(error.faults)


def ours(**keys: str) -> list[dict[str, str]]:
    claims: Any = SMALL["claims"]
    return [claims[1]["ours"][0] | keys]


def given(**keys: Any) -> dict[str, Any]:
    claims: Any = SMALL["claims"]
    return {"name": "cohens_d", "given": claims[0]["check"]["given"] | keys}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (changed(0, verdcit="x"), "full-d: there is no key 'verdcit' (did you mean verdict?)"),
        (changed(0, verdict="wrong"), "full-d: verdict is 'wrong', which is none of: reproduced, not reproduced, "),
        (changed(0, paper="other"), "full-d: paper is 'other', which is none of: full"),
        (changed(0, quote=" "), "full-d: quote has to be a text that is not empty, not ' '"),
        (changed(0, why=None), "full-d: why is missing"),
        (changed(0, id=None), "claim 1: id is missing"),
        (changed(0, id="full-run"), "full-run: id is there more than once"),
        (changed(0, check=None, ours=None, evidence=[{"run": "paper/run.json"}]),
         "full-d: verdict 'inconsistent with itself' needs a check, its arithmetic"),
        (changed(0, check=None, ours=None), "full-d: evidence is missing; give one of: test, run, command, source"),
        (changed(0, value={"figure": "much", "unit": "count"}), "full-d: value: figure has to be a number, not"),
        (changed(0, value={"figure": 1, "unit": "furlongs"}), "full-d: value.unit is 'furlongs', which is none of"),
        (changed(0, check={"name": "cohen"}), "full-d: check: there is no check cohen; choose one of: parameters_per"),
        (changed(0, check=given(runs=None, run=5)), "full-d: check: cohens_d: got an unexpected keyword argument"),
        (changed(0, check={"name": "parameters_per_device", "given": {"model": "gpt", "stated": 1}}),
         "full-d: check: there is no model=gpt"),
        (changed(0, check=given(stated=94.4)), "full-d: its check agrees with the claim, and the verdict is 'incons"),
        (changed(0, verdict="not testable here"), "full-d: its check contradicts the claim, and the verdict is 'not"),
        (changed(1, evidence=[{"command": "python -m helix plan"}]),
         "full-run: verdict 'reproduced' needs evidence by a test or a run"),
        (changed(1, evidence=[{"run": "paper/other.json"}]), "full-run: evidence: there is no run paper/other.json"),
        (changed(1, evidence=[{"test": "tests/test_a.py::test_two"}]), "there is no test tests/test_a.py::test_two"),
        (changed(1, evidence=[{"test": "tests/test_a.py::helper"}]), "there is no test tests/test_a.py::helper"),
        (changed(1, evidence=[{"test": "tests/test_b.py::test_one"}]), "there is no test tests/test_b.py::test_one"),
        (changed(1, evidence=[{"run": "paper/run.json", "command": "rm -r paper"}]),
         "full-run: evidence: a command starts with one of: python -m helix,"),
        (changed(1, evidence=[{"proof": "x"}]), "full-run: evidence: there is no key 'proof'; legal: test, run, comm"),
        (changed(1, ours=ours(value="1.3")), "full-run: ours: there is no key 'value'"),
        (changed(1, ours=ours(kind="felt")), "full-run: ours.kind is 'felt', which is none of: measured, modelled"),
        (changed(1, ours=ours(file="paper/a.json")), "full-run: ours: paper/a.json: there is no file"),
        (changed(1, ours=ours(path="rows[name=c].ratio")), "path rows[name=c].ratio: there is nothing at '[name=c]'"),
        (changed(1, ours=ours(path="rows[m=4].ratio")), "path rows[m=4].ratio: there is nothing at '[m=4]'"),
        (changed(1, ours=ours(path="rows[0].speed")), "path rows[0].speed: there is nothing at 'speed'"),
        (changed(1, ours=ours(path="word")), "paper/run.json: path word is 'none', which is no number"),
        (changed(1, ours=ours(interval="rows[0].ratio")), "full-run: ours: paper/run.json: "),
        (changed(1, ours=[{"label": "x", "kind": "computed", "unit": "count"}]),
         "full-run: ours has neither a file nor a check to take its figure from"),
        (changed(0, form="verse"), "full-d: form is 'verse', which is none of: verbatim, cells, formula"),
        (changed(0, verdict="not reproduced", check=given(stated=94.4), evidence=[{"run": "paper/run.json"}]),
         "full-d: its check agrees with the claim, and the verdict is 'not reproduced'"),
        (changed(0, check={"name": "change", "given": {"before": 0, "after": 1, "stated": 2}}),
         "full-d: check: change cannot be computed from {'after': 1, 'before': 0, 'stated': 2}: division by zero"),
        (changed(0, check=given(half="much")), "full-d: check: cohens_d cannot be computed from"),
        (changed(1, why="It is {1}."), "full-run: {1} names none of the 1 figures of ours, counted from {0}"),
        (changed(1, hard="Or {ratio}."), "full-run: {ratio} names none of the 1 figures of ours"),
        (changed(1, why="It is 2.0 times as fast."), "full-run: '2.0 times' is typed; write {0} for ours"),
        (SMALL | {"claims": []}, "claims has to be a list that is not empty"),
        (SMALL | {"claims": ["text"]}, "claim 1 has to be a mapping with the keys id, paper, section"),
        ({"papers": {"full": {"titel": "x", "setting": "y"}}, "claims": SMALL["claims"]},
         "papers.full: there is no key 'titel' (did you mean title?)"),
    ],
)  # fmt: skip
def test_a_fault_is_told_by_claim_and_key(written: Callable[[Any], Path], content: dict[str, Any], says: str) -> None:
    found = faults_of(written(content))
    assert any(says in each for each in found), found


def test_a_small_ledger_holds(written: Callable[[Any], Path]) -> None:
    small = read(written(SMALL))
    assert faults(small) == []
    filled = read(written(changed(1, why="It is {0},\nnot 2.5 times.")))
    assert table.row(filled, filled["full-run"]).why == "It is 2.00 times, not 2.5 times."
    (one,) = resolve.found(small, small["full-run"])
    assert (one.value, one.interval) == (2.0, (1.0, 3.0))


def test_places_in_a_run() -> None:
    assert resolve.look_up(RUN, "bytes.*") == 7
    assert resolve.look_up(RUN, 'bytes["all_gather/x.y"]') == 3
    assert resolve.look_up(RUN, "rows[1](low, ratio)") == [1.5, 2.0]
    with pytest.raises(ConfigError, match=r"path rows\[ cannot be read at '\['"):
        resolve.look_up(RUN, "rows[")


def test_a_csv_has_rows_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("setting,loss,note\nhelix,0.5,\n")
    assert resolve.load(tmp_path / "a.csv") == [{"setting": "helix", "loss": 0.5, "note": None}]
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.txt").touch()
    for name, says in {"b.json": "cannot be read", "c.txt": "neither .json nor .csv"}.items():
        with pytest.raises(ConfigError, match=says):
            resolve.load(tmp_path / name)


def test_the_ledger_is_checked(
    written: Callable[[Any], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(written(SMALL))
    main(["claims", "--ledger", path, "--check"])
    assert (
        capsys.readouterr().out == "2 claims hold: their files, tests and figures are there, and 1 sums come out so.\n"
    )
    for content in (changed(0, verdict="x", quote=""), changed(1, ours=ours(path="a", interval="b"))):
        with pytest.raises(SystemExit) as ended:
            main(["claims", "--ledger", str(written(content)), "--check"])
        assert ended.value.code == 1
        said = capsys.readouterr()
        faults = said.out.splitlines()
        assert faults == faults_of(Path(path))
        assert f"{path} has {len(faults)} fault" in said.err


def test_a_section_is_written_between_its_markers(
    written: Callable[[Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = str(written(SMALL)), tmp_path / "page.md"
    main(["claims", "--ledger", path, "--markdown"])
    summary = capsys.readouterr().out
    assert "| reproduced | 1 | 1 |" in summary
    row = '| `full-run` | "as fast" | reproduced | ratio: 2.00 (1.00 .. 3.00) times, measured |'
    for begin, holds in ((markdown.BEGIN, summary), (markdown.BEGIN_ALL, row)):
        page.write_text(f"before\n{begin}\nold\n{markdown.END}\nafter\n")
        main(["claims", "--ledger", path, "--update", str(page)])
        text = page.read_text()
        assert text.startswith(f"before\n{begin}\n\n")
        assert text.endswith(f"\n\n{markdown.END}\nafter\n")
        assert holds in text
        assert "\nold\n" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ledger", "none.yaml"], "there is no ledger none.yaml; run this in the repository, or give --ledger PATH"),
        (["--ledger", "none.yaml", "--check"], "there is no ledger none.yaml"),
        (["--ledger", "broken.yaml"], "broken.yaml is no YAML"),
        (["--ledger", "list.yaml"], "list.yaml is no YAML: a key has to be a text in"),
        (["--ledger", "twice.yaml"], "twice.yaml is no YAML: why is there twice in"),
        (["--id", "full-runs"], "there is no claim full-runs (did you mean full-run?)"),
        (["--id", ""], "there is no claim "),
        (["--paper", ""], "--paper is none of: full"),
        (["--update", ""], "--update .: there is no such file"),
        (["--paper", "other"], "--paper other is none of: full"),
        (["--verdict", "wrong"], "invalid choice: 'wrong'"),
        (["--id", "full-run", "--paper", "full"], "--paper chooses rows of the table, and --id shows none"),
        (["--update", "missing.md"], "--update missing.md: there is no such file"),
        (["--update", "plain.md"], "plain.md has no two lines"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str],
    says: str,
    written: Callable[[Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(SMALL)
    monkeypatch.chdir(tmp_path)
    Path("plain.md").write_text("nothing\n")
    Path("broken.yaml").write_text("a: [")
    Path("list.yaml").write_text("? [a, b]\n: c\n")
    Path("twice.yaml").write_text("claims:\n  - why: one\n    why: two\n")
    with pytest.raises(SystemExit) as ended:
        main(["claims", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
    assert Path("plain.md").read_text() == "nothing\n"


def test_more_than_one_fault_is_counted(written: Callable[[Any], Path]) -> None:
    with pytest.raises(LedgerError, match=r"\(1 more: python -m helix claims --check lists them\)"):
        read(written(changed(0, verdict="x", quote="")))
