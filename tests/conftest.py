"""The environment of every test, set before anything reads it."""

from __future__ import annotations

import os

# Tests run many ranks on few cores: a rank of one thread each, on the CPU, and W&B without a network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
