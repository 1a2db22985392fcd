"""What a job leaves and opens: no secret in any byte, no port but on loopback, and no pickle of a folder's loaded."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Command
from test_restart import SMALL
from texts import write_folder
from wandb_runs import wandb_records

pytestmark = pytest.mark.faults  # five commands; one of them loses a rank
SECRETS = {
    "WANDB_API_KEY": "5ec4e7" * 6 + "abcd",  # of the form that W&B accepts
    "HF_TOKEN": "hf_markOfAToken",
    "AWS_SECRET_ACCESS_KEY": "markOfAnotherKey",
    "MY_PASSWORD": "markOfAPassword",
}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@dataclass
class Done:
    """All that was done, and what was seen meanwhile."""

    folder: Path
    said: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    listening: set[tuple[str, str]] = field(default_factory=set)

    def run(self, name: str, script: str, *overrides: str, lose_rank: bool = False) -> None:
        """A command with secrets in its environment, its sockets looked at until it ends."""
        own = {**SECRETS, "TMPDIR": str(self.folder / "tmp")}
        arguments = [str(self.folder / "record"), script, *overrides]
        process = Command(str(Path(__file__).with_name("unpickled.py")), *arguments, env=own)
        deadline = time.monotonic() + 60
        while process.returncode is None and time.monotonic() < deadline:
            ranks = self._look(process.pid)
            # Once the W&B run is there, which has to be looked through as well.
            if lose_rank and len(ranks) >= 2 and list((self.folder / name).rglob("*.wandb")):
                ranks[-1].send_signal(signal.SIGKILL)
                lose_rank = False
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        process.kill()
        self.codes[name], self.said[name] = process.wait(10), "".join(process.read())

    def _look(self, pid: int) -> list[psutil.Process]:
        try:
            children = psutil.Process(pid).children()
            for each in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                for one in each.net_connections("inet"):
                    bound = one.status == psutil.CONN_LISTEN or one.type.name == "SOCK_DGRAM"
                    if bound and one.laddr:
                        self.listening.add((each.name(), one.laddr.ip))
        except psutil.Error:  # one has just ended
            return []
        return children


@pytest.fixture(scope="module")
def done() -> Iterator[Done]:
    """A training, one that goes on, a sweep with traces of its checkpoint, a model that speaks, a rank lost."""
    # Not pytest's, whose path is too long for that of a socket.
    with tempfile.TemporaryDirectory(prefix="sec-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        done = Done(folder)
        grid = ["parallel=helix_2x1"]
        small = [each for each in SMALL if "max_steps" not in each and "logger" not in each]
        train = [*small, "trainer.max_steps=4", *grid]
        done.run("train", "train.py", *train, f"hydra.run.dir={folder / 'train'}")
        saved = sorted((folder / "train" / "checkpoints").iterdir())[0]
        for kind in ("pkl", "pt", "bin"):
            (saved / f"rank-00000.{kind}").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
        done.run("resume", "train.py", *train, f"hydra.run.dir={folder / 'resume'}", f"ckpt={saved}")
        sweep = ["-m", f"hydra.sweep.dir={folder / 'sweep'}", "seed=1", "profile=true", f"ckpt={saved}", "model=dense"]
        sizes = [*(each for each in SMALL if each.startswith("model.")), "workload.seq_len=16", "workload.runs=2"]
        done.run("sweep", "infer.py", *sweep, *sizes, *grid)
        model = write_folder(folder / "model")
        for file in ("pytorch_model.bin", "training_args.bin", "vocab.pkl", "tokenizer.pt"):
            (model / file).write_bytes(pickle.dumps(Bomb(folder / "exploded")))
        speak = ["model=pretrained", f"model.path={model}", "prompt=Hello", "generate.max_new_tokens=3"]
        done.run("speak", "infer.py", *speak, *grid, "workload.runs=2", f"hydra.run.dir={folder / 'speak'}")
        done.run("lost", "train.py", *train, f"hydra.run.dir={folder / 'lost'}", lose_rank=True)
        yield done


def test_all_of_it_ran(done: Done) -> None:
    """Or what follows would prove nothing."""
    assert done.codes == {name: int(name == "lost") for name in done.codes}, done.said
    assert "killed" in done.said["lost"]
    assert len(list(done.folder.rglob("*.wandb"))) == 5
    assert json.loads((done.folder / "resume" / "train_report.json").read_text())["resumed"]


def test_no_secret_in_any_byte(done: Done) -> None:
    held = {name: text.encode() for name, text in done.said.items()}
    for path in done.folder.rglob("*"):
        if path.is_file():
            held[str(path)] = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for run in done.folder.rglob("*.wandb"):
        held[f"{run} decoded"] = json.dumps(wandb_records(run.parent), default=str).encode()
    assert any(name.endswith(".json.gz") for name in held)  # traces
    found = [(name, secret) for name, text in held.items() for secret in SECRETS.values() if secret.encode() in text]
    assert not found


def test_wandb_does_not_hold_the_command_line(done: Done) -> None:
    for run in done.folder.rglob("*.wandb"):
        content = run.read_bytes()
        assert b"model.layers=" not in content
        assert f"hydra.run.dir={done.folder}".encode() not in content


def test_ports_are_on_loopback_alone(done: Done) -> None:
    """Those of the store that ranks meet at, of gloo, and of W&B's service."""
    assert done.listening
    assert {at for _, at in done.listening} <= {"127.0.0.1", "::1"}, done.listening


def test_no_pickle_but_the_jobs_own(done: Done) -> None:
    record = (done.folder / "record").read_text().splitlines()
    assert any(line.startswith("own") for line in record)  # the hook works
    assert not [line for line in record if line.startswith("foreign")]
    assert not (done.folder / "exploded").exists()


def test_the_bombs_are_real(tmp_path: Path) -> None:
    with (tmp_path / "bomb").open("wb") as file:
        torch.save(Bomb(tmp_path / "exploded"), file)
    torch.load(tmp_path / "bomb", weights_only=False)
    assert (tmp_path / "exploded").exists()
    shutil.rmtree(tmp_path / "exploded")
