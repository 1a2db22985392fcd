"""The stored notebooks and their runs: in order, executed, without library code, and of no particular machine."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

from helix.study.runs import load_runs

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
_A_PLACE = re.compile(r"(?<![\w.:/])/(work|home|root|tmp|Users|private)/")


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    """notebooks/execute.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs() -> Any:
    """The stored runs; a damaged one would be a warning, and so an error."""
    return load_runs(FOLDER / "data")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def words(notebook: nbformat.NotebookNode) -> str:
    """All that the outputs say, pictures left out."""
    said = []
    for output in (output for cell in code(notebook) for output in cell.outputs):
        data = output.get("data", {})
        said += [output.get("text", ""), *(str(data[kind]) for kind in data if kind.startswith("text/"))]
    return "\n".join(said)


def test_they_are_numbered() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, 8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStored:
    def test_it_is_a_notebook(self, path: Path) -> None:
        notebook = read(path)
        nbformat.validate(notebook)
        assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
        assert notebook.metadata.kernelspec.name == "python3"
        assert path.stat().st_size < 1e6

    def test_it_asks_and_answers_one_question(self, path: Path) -> None:
        first = read(path).cells[0]
        title, _, answer = first.source.partition("\n")
        assert first.cell_type == "markdown"
        assert re.fullmatch(r"# .+\?", title)
        assert answer.strip()

    def test_it_was_executed_in_order_and_without_complaint(self, path: Path) -> None:
        cells = code(read(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
        assert not [cell.metadata for cell in cells if "execution" in cell.metadata]  # when it ran says nothing

    def test_it_defines_nothing_and_asserts_what_it_says(self, path: Path) -> None:
        nodes = [node for cell in code(read(path)) for node in ast.walk(ast.parse(cell.source))]
        assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        assert [node for node in nodes if isinstance(node, ast.Assert)]

    def test_its_widgets_are_stored(self, path: Path) -> None:
        notebook = read(path)
        kept = (
            notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
        )
        for cell in code(notebook):
            if re.search(r"\binteractive\(", cell.source):
                shown = [output.get("data", {}) for output in cell.outputs]
                views = [data[WIDGET]["model_id"] for data in shown if WIDGET in data]
                assert views
                assert set(views) <= set(kept)  # or JupyterLab shows "Error displaying widget"

    def test_its_code_is_as_wide_as_the_page(self, path: Path) -> None:
        assert max(len(line) for cell in code(read(path)) for line in cell.source.splitlines()) <= 100

    def test_its_outputs_name_no_place_and_no_machine(self, path: Path, runs: Any) -> None:
        said = words(read(path))
        assert not _A_PLACE.findall(said)
        for host in set(runs.host.dropna()):
            assert not re.search(rf"\b{re.escape(host)}\b", said)


class TestRuns:
    def test_all_are_whole(self, runs: Any) -> None:
        assert set(runs.state) == {"finished"}
        assert all(isinstance(report, dict) for report in runs.report)
        assert all(len(history) for history in runs.history)
        assert set(runs["config.logger.mode"]) == {"offline"}

    def test_where_they_come_from_is_told(self, runs: Any) -> None:
        told = json.loads((FOLDER / "data" / "provenance.json").read_text())
        assert told["machine"]["cpu"]
        assert told["machine"]["cores"] > 0
        assert set(runs["report.git_commit"]) == {told["git_commit"]}
        folders = [Path(path).relative_to(FOLDER / "data").as_posix() for path in runs.path]
        for folder in folders:
            assert any(folder.startswith(run["folder"]) for run in told["runs"])
        assert all(any(folder.startswith(run["folder"]) for folder in folders) for run in told["runs"])

    def test_they_are_small_and_lead_nowhere_else(self) -> None:
        files = [path for path in (FOLDER / "data").rglob("*") if not path.is_dir()]
        assert sum(path.stat().st_size for path in files) < 2e6
        assert not [path for path in files if path.is_symlink()]  # as W&B makes into its cache

    def test_a_folder_of_older_runs_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "older").touch()
        done = subprocess.run([FOLDER / "runs.sh", tmp_path], capture_output=True, text=True, timeout=30)
        assert done.returncode == 2
        assert "is not empty" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["older"]


class TestExecute:
    def test_a_conclusion_that_no_longer_follows_fails(self, execute: ModuleType, tmp_path: Path) -> None:
        notebook = nbformat.v4.new_notebook()
        notebook.cells = [nbformat.v4.new_code_cell(source) for source in ("left = 1", "assert left == 2", "left = 3")]
        nbformat.write(notebook, tmp_path / "before.ipynb")
        fault = execute.execute(tmp_path / "before.ipynb", tmp_path / "after.ipynb")
        assert "AssertionError" in fault
        assert [cell.execution_count for cell in read(tmp_path / "after.ipynb").cells] == [1, 2, None]

    def test_a_warning_is_a_fault(self, execute: ModuleType) -> None:
        said = nbformat.v4.new_output("stream", name="stderr", text="DamagedRun: ..\n")
        quiet = nbformat.v4.new_output("stream", name="stdout", text="1\n")
        for outputs, fault in (([quiet], None), ([quiet, said], "on stderr: DamagedRun: ..")):
            cell = nbformat.v4.new_code_cell("1", outputs=outputs)
            assert execute.warned(nbformat.v4.new_notebook(cells=[cell])) == fault

    def test_what_is_random_is_taken_out(self, execute: ModuleType) -> None:
        settled = []
        for random in ("0123456789abcdef" * 2, "fedcba9876543210" * 2):
            cell = nbformat.v4.new_code_cell("1", id="07-01", metadata={"execution": {"iopub.execute_input": random}})
            shown = {"application/vnd.jupyter.widget-view+json": {"model_id": random, "commit": "a" * 40}}
            cell.outputs = [nbformat.v4.new_output("display_data", shown)]
            state = {random: {"children": [f"IPY_MODEL_{random[::-1]}"]}, random[::-1]: {"state": {}}}
            settled.append(execute.settle(nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": state})))
        assert settled[0] == settled[1]
        assert list(settled[0].metadata.widgets) == [f"{number:032x}" for number in (1, 2)]
        assert "a" * 40 in json.dumps(settled[0])
