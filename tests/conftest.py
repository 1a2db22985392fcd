"""The environment of every test, set before anything reads it."""

from __future__ import annotations

import gc
import os

import pytest

# Tests run many ranks on few cores: a rank of one thread each, on the CPU, and W&B without a network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"


@pytest.fixture(scope="session")
def deepspeed() -> None:
    """DeepSpeed in the process that forks the ranks, which else import it each for itself, two seconds of a core."""
    from helix.models.experts import load_deepspeed

    load_deepspeed("cpu")


@pytest.fixture(scope="module", autouse=True)
def imported_for_good() -> None:
    """Every launch begins with a collection, which else visits all that was imported so far: 0.4 s each."""
    gc.collect()
    gc.freeze()
