"""What the README and the guides show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from readme import PAGES, ROOT, script

from helix import launch


def _train(code: str) -> list[float]:
    """The README's script on this rank, its own launch left to the test: sums of the layer's weights, trained."""
    seen: list[Any] = []
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "training.md", "exec"), names)
    lit = names["Lit"]

    class Kept(lit):
        def on_train_end(self) -> None:
            seen.extend([float(self.embedding.weight.double().sum()), *map(float, self.losses)])

        def training_step(self, batch: Any, index: int) -> Any:
            loss = super().training_step(batch, index)
            self.losses = [*getattr(self, "losses", []), loss.detach()]
            return loss

    names["Lit"] = Kept
    names["train"]()
    return seen


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loggers and workers, which a reader sees as well
def test_the_lightning_module_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning logs to the current folder
    results = launch(_train, script("LightningModule"), ranks=4, timeout_s=30)
    weights, *losses = results[0]
    assert len(losses) == 8
    assert all(torch.isfinite(torch.tensor([weights, *losses])))
    assert results == [results[0]] * 4


def test_the_partitioned_model_answers(capfd: pytest.CaptureFixture[str]) -> None:
    exec(compile(script("helixify"), "real_models.md", "exec"), {"__name__": "__main__"})
    said = capfd.readouterr().out.strip().splitlines()[-1]
    assert said.startswith("[1, 2, 3, ")
    assert len(said.split(",")) == 8


def test_the_plan_is_made(capfd: pytest.CaptureFixture[str]) -> None:
    exec(compile(script("helix.plan("), "planning.md", "exec"), {"__name__": "__main__"})
    said = capfd.readouterr().out.splitlines()
    assert (
        said[0] in (ROOT / "docs" / "planning.md").read_text().splitlines()
    )  # the layout that the table above it shows
    assert said[-1].startswith("Times are modelled")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "notebooks" / "README.md", ROOT / "paper" / "README.md"], ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
