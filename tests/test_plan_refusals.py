"""What `python -m helix` refuses in one sentence before it works, and what it takes by a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.backend_bases import FigureCanvasBase

from helix.__main__ import main
from helix.config.schema import ConfigError
from helix.study.plan_command import PICTURES, check_file


@pytest.mark.parametrize("words", [["plan", "--map"], ["plan", "--plot"], ["validate", "cpu", "--plot"]])
def test_a_picture_that_cannot_be_written_is_refused_first(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path, said in (("/proc/x.png", "cannot be written"), ("/tmp/p.xyz", "end it with one of: .png, .pdf")):
        with pytest.raises(SystemExit) as stopped:
            main([*words, path])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"{words[-1]} {path}" in error
        assert said in error
        assert len(error.splitlines()) == 1


def test_a_file_is_checked_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    check_file("--json", tmp_path / "old.json")
    check_file("--plot", tmp_path / "new.PNG", picture=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "{}"
    with pytest.raises(ConfigError, match="cannot be written"):
        check_file("--json", Path("/proc/x.json"))
    assert {suffix[1:] for suffix in PICTURES} <= set(FigureCanvasBase.get_supported_filetypes())
