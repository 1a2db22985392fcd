"""What is shown, kept in a sweep's table and sent to W&B of a generation."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sweeps import a_job, a_report

from helix.command.sweep import REPORT
from helix.config.words import figure
from helix.generation.run import _headline
from helix.generation.table import render
from helix.study.report import Accuracy, Collectives, Generation, MethodLabel, Report, Rival, Schedules, Traffic, write
from helix.study.statistics import paired, summarize
from helix.study.sweep import table


def a_rival(report: Report, name: str, of_main: list[float], own: list[float]) -> Rival:
    found = {key: getattr(report, key) for key in Rival.__dataclass_fields__ if hasattr(report, key)}
    found |= {"method": MethodLabel(name, 1, 12, Schedules(None)), "paired": paired(own, of_main)}
    return Rival(**found | {"paired_ttft": paired(own, of_main)})


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Of two runs, whose scatter is as wide as can be."""
    found = replace(
        a_report(a_job(tmp_path, 0, 4, 3), 1000.0),
        ttft_ms=summarize([1.5e3, 1.6e3]),
        tpot_ms=summarize([210.0, 240.0]),
        step_ms=summarize([210.0, 240.0]),
        prefill_bytes_per_rank=Traffic({"all_reduce/mlp.leave": 40}, None),
        accuracy=Accuracy("transformers_single", 2e-7, tokens_equal=True, differing_prompts=()),
        collectives=Collectives(122, 4.0, *(summarize([a, 2 * a]) for a in (800.0, 90.0, 0.3))),
        generation=Generation([5], [9], ["Hi"], ["you"], {"temperature": 0.0}),
    )
    wide = a_rival(found, "single", [210.0, 240.0], [100.0, 24000.0])
    return replace(found, baselines=[wide, a_rival(found, "hf_tp12", [210.0, 240.0], [200.0, 250.0])])


def test_a_name_is_whole_beside_the_widest_interval(report: Report) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render(report))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if line.startswith(("helix_4x3", "single", "hf_tp12"))]
    assert "e+" in next(
        line for line in rows if line.startswith("single ")
    )  # 95 % of two runs: up to many powers of 10
    assert [row.split()[-1] for row in rows[1:4]] == ["equal"] * 3
    assert "…" not in text
    assert "ms/step" in text
    assert "ms/token" not in text
    assert (figure(1.13e13), figure(123456.0)) == ("1.13e+13", "123,456")


def test_collectives_are_in_a_sweeps_table_and_in_the_headline(report: Report, tmp_path: Path) -> None:
    job = a_job(tmp_path, 0, 4, 3)
    write(report, job.folder / REPORT)
    row = table([job]).iloc[0]
    said = _headline(report)
    for name in ("transfer_us", "wait_us", "share_of_step"):
        mean = getattr(report.collectives, name).mean
        assert row[f"collectives_{name}"] == said[f"collectives/{name}/mean"] == pytest.approx(mean)
    for name, count in (("per_step", 122), ("per_layer", 4)):
        assert row[f"collectives_{name}"] == said[f"collectives/{name}"] == count
