"""The report: its text refers to numbers that exist, types none, and the stored PDF is of today's inputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paper.report import formulas, prose, said, words
from paper.report.contents import FOLDER, Contents, collect
from paper.report.errors import ReportError
from paper.report.prose import Text
from paper.report.sources import Sources
from paper.report.typeset import compiled, pages, stored_digest, write_data


@pytest.fixture(scope="module")
def contents() -> Contents:
    """Every number, table and name of a figure, checked against the text as the build checks them."""
    return collect()


def test_every_number_has_a_name_and_every_name_a_place(contents: Contents) -> None:
    assert len(contents.numbers) > 100
    assert all(contents.numbers.values())
    for name, rows in contents.tables.items():
        assert len({len(row) for row in rows}) == 1, name


def test_the_stored_pdf_is_of_these_inputs(contents: Contents) -> None:
    (keyword,) = (each for each in contents.content()["keywords"] if each.startswith("inputs-"))
    stored = stored_digest(FOLDER / "helix.pdf")
    assert f"inputs-{stored}" == keyword, "paper/helix.pdf is of other inputs: run `make paper` and commit it"


def test_results_are_read_and_none_is_typed(contents: Contents) -> None:
    """No text of a number is a literal of the code that makes it."""
    code = "".join(path.read_text() for path in (FOLDER / "report").glob("m*.py"))
    literals = set(re.findall(r"\"([^\"{}]*)\"", code))
    assert not [name for name, text in contents.numbers.items() if text in literals]


@pytest.mark.parametrize(
    "typed",
    [
        "Exact schedules are 1.13 times as fast.",
        "It ran on $12$ ranks.",
        "off by $10^(-7)$ at most, $x = 0.73$",
        "see `0.73` of it",
        "a median of 17 %",
        "on `parallel.m=16` ranks",
    ],
)
def test_a_typed_digit_is_found(typed: str) -> None:
    text = Text(Path("x.typ"), f"A line.\n{typed}\n")
    with pytest.raises(ReportError, match=r"x\.typ, line 2, has a digit typed"):
        prose.check_digits([text])


def test_names_and_constants_are_no_numbers() -> None:
    allowed = """#import "../template.typ": *
    = Heads of H100s, FP32 and SmolLM2-135M <h100> // a comment of 1919
    On `helix_4x4` as in @korthikanti2022, $d \\/ 2$, $4 h_g B P d \\/ m$ and $2^m$: #n("core256.batch") at 6pt.
    #tabled("x", fr(0.5, 1), ([a], [b]), [Caption.])
    """
    prose.check_digits([Text(Path("x.typ"), allowed)])


def test_unknown_and_unused_names_are_named() -> None:
    text = Text(Path("x.typ"), '#n("a.b") #pictured("p", [..]) #tabled("t", fr(1), ([..],), [..])')
    made = {"numbers": ["a.b"], "figures": ["p"], "tables": ["t"]}
    prose.check_names([text], made)
    with pytest.raises(ReportError, match=r"numbers that nothing makes: a\.b"):
        prose.check_names([text], made | {"numbers": []})
    with pytest.raises(ReportError, match="these figures are made and stand nowhere in the text: q"):
        prose.check_names([text], made | {"figures": ["p", "q"]})


def test_citations_are_in_the_bibliography() -> None:
    with pytest.raises(ReportError, match=r"neither a label nor in references\.bib: nobody2031"):
        prose.check_citations([Text(Path("x.typ"), "as @nobody2031 says")], FOLDER)
    with pytest.raises(ReportError, match=r"entries that the text does not cite: .*vaswani2017"):
        prose.check_citations([Text(Path("x.typ"), "nothing cited")], FOLDER)


def test_a_result_that_contradicts_the_text_stops_the_build(
    contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    said.check(contents.sources)
    layer = contents.sources.json("bench_layer")["speed_ratio"]["perslice"]["batch"]
    monkeypatch.setitem(layer, "ci95", [1.2, 1.3])
    with pytest.raises(ReportError, match="no longer show: over the whole layer no difference could be told"):
        said.check(contents.sources)


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "paper/results").mkdir(parents=True)
    with pytest.raises(ReportError, match=r"paper/results has no result DATE_parity\.json"):
        Sources(tmp_path).json("parity")


def test_the_newest_result_of_a_name_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "paper/results"
    folder.mkdir(parents=True)
    for day, value in (("2026-01-02", 1), ("2026-03-04", 2), ("2026-02-03", 3)):
        (folder / f"{day}_x.json").write_text(f'{{"value": {value}}}')
    sources = Sources(tmp_path)
    assert sources.json("x") == {"value": 2}
    assert sources.days() == ["2026-03-04"]


def test_a_formula_that_differs_from_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(formulas.rows()) == len(formulas.ROWS)
    monkeypatch.setitem(formulas.ROWS, "batch", formulas.ROWS["rows"])
    with pytest.raises(ReportError, match="the formula of batch's bytes gives"):
        formulas.rows()


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (words.error(4.77e-7), "4.8\u00a0\u00d7\u00a010\u207b\u2077"),
        (words.error(0), "0"),
        (words.figure(10000), "10,000"),
        (words.figure(0.57290), "0.573"),
        (words.percent(0.3170, 1), "31.7\u00a0%"),
        (words.ratio({"ratio": 1.5407, "ci95": (1.482, 1.6)}), "1.54\u00a0(1.48\u2060\u2013\u20601.60)"),
        (words.fixed(-0.5, 1), "\u22120.5"),
        (words.listed(["2", "4", "8"]), "2, 4 and 8"),
        (
            words.typeset("off by 2.38e-07 .. 1.0, +-5"),
            "off by 2.4\u00a0\u00d7\u00a010\u207b\u2077\u2060\u2013\u20601.0, \u00b15",
        ),
    ],
)
def test_numbers_are_printed_so(made: str, text: str) -> None:
    assert made == text


def test_typst_says_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "helix.typ").write_text("#let last(name) = context [#metadata(here().page()) #label(name)]\nSee @x.")
    with pytest.raises(ReportError, match=r"typst: label `<x>` does not exist"):
        compiled(tmp_path, "pdf")
    (tmp_path / "helix.typ").write_text('#set text(font: "No such font")\nText.')
    with pytest.raises(ReportError, match="typst warns: unknown font family"):
        compiled(tmp_path, "pdf")


def test_pages_are_counted(tmp_path: Path) -> None:
    mark = "#let mark(name) = context [#metadata(here().page()) #label(name)]\n"
    (tmp_path / "helix.typ").write_text(mark + 'One.\n#pagebreak()\nTwo.#mark("text_end")\n#pagebreak()\n#mark("end")')
    assert pages(tmp_path) == (2, 3)


def test_a_word_wider_than_its_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "template.typ").write_text((FOLDER / "template.typ").read_text())
    rows = [["a", "word_that_nothing_breaks"]]
    write_data(tmp_path, {"numbers": {}, "tables": {"t": rows}, "figures": [], "equations": {}})
    for shares, fits in (("1, 1", True), ("9, 1", False)):
        (tmp_path / "helix.typ").write_text(
            f'#import "template.typ": *\n#set page(width: 600pt)\n#made("t", fr({shares}), ([x], [y]))'
        )
        if fits:
            compiled(tmp_path, "pdf")
        else:
            with pytest.raises(
                ReportError, match="table t has a word wider than its column: word_that_nothing_breaks"
            ):
                compiled(tmp_path, "pdf")
