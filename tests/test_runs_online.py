"""`load_runs` at the boundary of W&B's online API."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import wandb
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from helix.study.runs import load_runs

ANSWER: Any = SimpleNamespace(message="no")


class Api:
    """As much of `wandb.Api` as is called, with what its server sent."""

    def __init__(self, timeout: int | None = None) -> None:
        pass

    def runs(self, path: str, lazy: bool) -> Iterator[SimpleNamespace]:
        assert not lazy
        if path != "someone/helix":
            raise ValueError(f"Could not find project {path}")
        history: list[dict[str, Any]] = [{"_step": 0, "_runtime": 0.5, "_timestamp": 1.0, "loss": 2.0}]
        yield SimpleNamespace(
            id="a1",
            state="crashed",
            created_at="2026-11-22T10:00:00Z",
            metadata={"host": "node"},
            config={"model": {"name": "tiny"}, "_wandb": {}},
            summary_metrics={"_step": 0, "_wandb": {"runtime": 1}, "loss": "NaN"},
            scan_history=lambda: iter(history),
        )


def test_a_project_has_the_same_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Api", Api)
    runs = load_runs("someone/helix")
    assert len(runs) == 1
    run = runs.iloc[0]
    assert (run.run_id, run.path, run.state, run.host) == ("a1", "someone/helix/a1", "crashed", "node")
    assert (run["config.model.name"], run.report) == ("tiny", None)
    assert math.isnan(run["summary.loss"])
    assert list(run.history["loss"]) == [2.0]
    assert run.started_at == pd.Timestamp("2026-11-22T10:00", tz="UTC")
    with pytest.raises(ValueError, match="no folder 'someone/else', and W&B gives no project of that name: Could not"):
        load_runs("someone/else")


def test_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(timeout: int | None = None) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(ValueError, match="takes an account: run `wandb login` or set WANDB_API_KEY"):
        load_runs("someone/helix")


@pytest.mark.parametrize(
    ("cause", "fault"),
    [
        (WandbApiFailedError("the service process is busy"), "http://127.0.0.1:9 cannot be reached within 4 s$"),
        (
            WandbApiFailedError("no", ANSWER),
            "http://127.0.0.1:9 does not take the account .no",
        ),
    ],
)
def test_a_server_that_does_not_let_in(monkeypatch: pytest.MonkeyPatch, cause: Exception, fault: str) -> None:
    def refuse(timeout: int | None = None) -> None:
        assert timeout == 4
        raise wandb.errors.AuthenticationError(str(cause)) from cause

    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=f"no folder 'someone/helix', and as a W&B project it is not read: {fault}"):
        load_runs("someone/helix")
